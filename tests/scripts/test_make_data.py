"""scripts/make_data.py as users run it: rows, split, bad input in one line; the README's chapter on it."""

import json
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_readme import FENCE, demo_sizes, read

from common.cli import run_main
from common.weights import describe, half_state, save_weights
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

sys.path.insert(0, str(ROOT / "scripts"))
import make_data

FILES = ["pretrain.jsonl", "pretrain_val.jsonl", "sft.jsonl", "sft_val.jsonl"]
PICTURES = 24
HEADING = "\n## Train on your own pictures in five minutes\n"


def draw(path: Path, number: int, size: int = 96, **settings) -> None:
    """A picture that looks like that of the same number alone."""
    colours = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).resize((96, 96), Image.Resampling.BICUBIC).resize((size, size)).save(
        path, **settings
    )


@pytest.fixture
def make(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Runs the script to its end: make("--csv", path, expect=1); what it printed, on stderr if it failed."""

    def make(*flags, expect: int = 0, out: Path = tmp_path / "out") -> str:
        command = ["make_data.py", "--images_path", tmp_path / "images", "--out_dir", out, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            run_main(make_data.main)
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == expect, printed.err
        return printed.err if expect else printed.out

    return make


@pytest.fixture
def table(tmp_path) -> Callable[[str], Path]:
    """Writes labels.csv beside images/, which has 0.png to 7.png."""
    for number in range(8):
        draw(tmp_path / f"images/{number}.png", number)

    def table(content: str | bytes) -> Path:
        path = tmp_path / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return table


@pytest.fixture
def variants(tmp_path) -> Path:
    """A table about 24 pictures, each as it is, half as large, and as a JPEG of low quality elsewhere."""
    lines = []
    for number in range(PICTURES):
        draw(tmp_path / f"images/{number}.png", number)
        draw(tmp_path / f"images/small {number}.png", number, size=48)
        draw(tmp_path / f"images/web/{number}.jpg", number, quality=60)
        for name in (f"{number}.png", f"small {number}.png", f"web/{number}.jpg"):
            lines += [f"{name},What is this?,thing {number}\n", f"{name},Which number?,{number}\n"]
    random.Random(0).shuffle(lines)
    path = tmp_path / "labels.csv"
    path.write_text("file,question,answer\n" + "".join(lines))
    return path


@pytest.fixture
def classes(tmp_path) -> Path:
    """images/ with the folders big_cat and dog, five pictures each."""
    for number in range(5):
        draw(tmp_path / f"images/big_cat/{number}.png", number)
        draw(tmp_path / f"images/dog/more/{10 + number}.JPG", 10 + number)
    return tmp_path / "images"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images(path: Path) -> set[str]:
    return {row["image"] for row in rows(path)}


def turns(row: dict) -> tuple[str, str]:
    (question, answer) = row["conversations"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    return question["content"], answer["content"]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_picture_and_no_near_duplicate_is_on_both_sides(make, variants, tmp_path, seed):
    printed = make("--csv", variants, "--eval_share", 0.25, "--seed", seed)

    learnt, held = images(tmp_path / "out/sft.jsonl"), images(tmp_path / "out/sft_val.jsonl")
    numbers = [{Path(name).stem.removeprefix("small ") for name in side} for side in (learnt, held)]
    assert [len(side) for side in numbers] == [18, 6] and not numbers[0] & numbers[1]
    assert [len(learnt), len(held)] == [54, 18]
    assert [len(rows(tmp_path / "out" / name)) for name in ("sft.jsonl", "sft_val.jsonl")] == [108, 36]
    assert printed.splitlines() == [
        "72 pictures, 48 of them near-duplicates of another: 54 to train on, 18 held out",
        f"{tmp_path / 'out/sft.jsonl'}: 108 rows",
        f"{tmp_path / 'out/sft_val.jsonl'}: 36 rows",
    ]


def test_other_seeds_hold_out_other_pictures(make, variants, tmp_path):
    for seed in (0, 1):
        make("--csv", variants, "--seed", seed, out=tmp_path / f"out{seed}")

    assert images(tmp_path / "out0/sft_val.jsonl") != images(tmp_path / "out1/sft_val.jsonl")


def test_the_same_seed_gives_the_same_bytes(make, classes, tmp_path):
    for out in ("a", "b"):
        make(out=tmp_path / out)

    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    assert sorted(all_bytes(tmp_path / "a")) == FILES


def test_the_order_of_rows_changes_no_split(make, variants, tmp_path):
    make("--csv", variants, out=tmp_path / "a")
    header, *lines = variants.read_text().splitlines(keepends=True)
    variants.write_text(header + "".join(sorted(lines)))
    make("--csv", variants, out=tmp_path / "b")

    for name in ("sft.jsonl", "sft_val.jsonl"):
        assert images(tmp_path / "a" / name) == images(tmp_path / "b" / name)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("file,question,answer\n0.png,Who?,A bee\n./0.png,Where?,Here\n", id="plain"),
        pytest.param(
            "\ufeffFile , Question,ANSWER\r\n0.png, Who? ,A bee\r\n0.png,Where?,Here", id="BOM, CRLF"
        ),
        pytest.param(
            'answer,id,file,question\n"A bee",7,0.png,Who?\n,,,\n\nHere,,0.png,Where?\n', id="blank lines"
        ),
    ],
)
def test_each_question_is_a_row_of_its_own(make, table, tmp_path, content):
    make("--csv", table(content), "--eval_share", 0)

    assert sorted(all_bytes(tmp_path / "out")) == ["sft.jsonl"]
    assert [turns(row) for row in rows(tmp_path / "out/sft.jsonl")] == [
        ("<image>\nWho?", "A bee"),
        ("<image>\nWhere?", "Here"),
    ]
    assert images(tmp_path / "out/sft.jsonl") == {"0.png"}


def test_captions_make_rows_to_pretrain_on(make, table, tmp_path):
    content = 'file,caption,question,answer\n0.png,"一只鹿，\n还有一只",Who?,"A deer, standing"\n'
    make("--csv", table(content), "--eval_share", 0)

    (pretrain,), (sft,) = (rows(tmp_path / "out" / name) for name in ("pretrain.jsonl", "sft.jsonl"))
    prompt, caption = turns(pretrain)
    assert prompt.removeprefix("<image>\n") in make_data.PROMPTS and caption == "一只鹿，\n还有一只"
    assert turns(sft) == ("<image>\nWho?", "A deer, standing")


def test_a_class_gives_each_picture_a_caption_and_a_question(make, classes, tmp_path):
    (classes / ".DS_Store").write_text("no class")
    (classes / "dog/._10.jpg").write_text("no picture")
    (classes / "dog/notes.txt").write_text("no picture")
    printed = make("--eval_share", 0.2)

    assert printed.startswith(
        "10 pictures, 0 of them near-duplicates of another: 8 to train on, 2 held out\n"
    )
    made = {name: rows(tmp_path / "out" / name) for name in FILES}
    assert [len(part) for part in made.values()] == [8, 2, 8, 2]
    assert images(tmp_path / "out/sft.jsonl") == images(tmp_path / "out/pretrain.jsonl")
    for part in ("sft", "pretrain"):
        for row in made[f"{part}.jsonl"] + made[f"{part}_val.jsonl"]:
            name = {"big_cat": "big cat", "dog": "dog"}[row["image"].partition("/")[0]]
            question, answer = turns(row)
            assert question.startswith("<image>\n")
            if part == "sft":
                assert question.removeprefix("<image>\n") in make_data.QUESTIONS and answer == name
            else:
                assert answer in [text.format(name) for text in make_data.CAPTIONS]


HEADER = "file,question,answer\n"
EXPECTED = "expected the columns file, question and answer, or file and caption, found"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "no rows", id="nothing"),
        pytest.param(HEADER, "no rows", id="header alone"),
        pytest.param("picture,caption\n", f"labels.csv:1: {EXPECTED} 'picture', 'caption'", id="no file"),
        pytest.param("File,Question\n", f"labels.csv:1: {EXPECTED} 'File', 'Question'", id="no answer"),
        pytest.param(
            "file,caption,answer\n", f"labels.csv:1: {EXPECTED} 'file', 'cap", id="half of a question"
        ),
        pytest.param(
            "file;question;answer\n", f"labels.csv:1: {EXPECTED} 'file;question;answer'", id="semicolons"
        ),
        pytest.param("file,caption,Caption\n", f"labels.csv:1: {EXPECTED} 'file', 'cap", id="a column twice"),
        pytest.param("0.png,Who?,A bee\n", f"labels.csv:1: {EXPECTED} '0.png', 'Who?'", id="no header"),
        pytest.param(
            HEADER + "0.png,Who?,A bee\n1.png,Who?, \n", "labels.csv:3: 'answer' is empty", id="no answer"
        ),
        pytest.param(HEADER + "0.png,,A bee\n", "labels.csv:2: 'question' is empty", id="no question"),
        pytest.param(HEADER + " ,Who?,A bee\n", "labels.csv:2: 'file' is empty", id="no name"),
        pytest.param("file,caption\n0.png,\n", "labels.csv:2: 'caption' is empty", id="no caption"),
        pytest.param(
            HEADER + "0.png,Who?,A bee, and more\n",
            "labels.csv:2: 4 cells, expected 3: a text with a comma in it needs quotation marks",
            id="comma",
        ),
        pytest.param(
            HEADER + '0.png,"Who\n?",Me\n1.png,Who?\n', "labels.csv:4: 2 cells, expected 3", id="short"
        ),
        pytest.param(
            HEADER + '0.png,Who?,"A bee\n', "labels.csv:2: not CSV (unexpected end", id="open quote"
        ),
        pytest.param(
            HEADER + "0.png,<image> Who?,A bee\n",
            "labels.csv:2: 'question' has <image> in it, expected text alone",
            id="marker in a question",
        ),
        pytest.param(
            HEADER + "0.png,Who?,<image>\n",
            "labels.csv:2: 'answer' has <image> in it",
            id="marker in an answer",
        ),
        pytest.param(
            "file,caption\n0.png,<image>\n", "labels.csv:2: 'caption' has <image>", id="marker in a caption"
        ),
        pytest.param(
            HEADER + "0.png,Who?,A bee\n9.png,Who?,I\n9.png,Why?,So\na/b.png,Who?,I\n",
            "labels.csv:3: cannot read image {images}/9.png ([Errno 2] No such file",
            id="missing picture",
        ),
        pytest.param(HEADER.encode() + b"0.png,Who?,\xe9t\xe9\n", "labels.csv:2: not UTF-8 (", id="Latin-1"),
        pytest.param(HEADER.encode("utf-16"), "labels.csv:1: not UTF-8 (", id="UTF-16"),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_row(make, table, tmp_path, content, message):
    error = make("--csv", table(content), expect=1)

    (line,) = error.splitlines()
    assert line.startswith("error: ") and message.format(images=tmp_path / "images") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "not a picture, expected PNG, JPEG", id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:200]), "truncated", id="cut off"),
        pytest.param(lambda path: draw_strip(path), "one side over 100 times the other", id="strip"),
    ],
)
def test_a_broken_picture_is_one_line_that_names_the_row(make, table, tmp_path, break_it, message):
    lines = [f"{number}.png,Who?,A bee\n" for number in (0, 5, 3, 5, 7)]
    for name in ("3.png", "5.png"):
        break_it(tmp_path / "images" / name)
    error = make("--csv", table(HEADER + "".join(lines)), expect=1)

    assert error.startswith(f"error: labels.csv:3: cannot read image {tmp_path / 'images/5.png'} (")
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def draw_strip(path: Path) -> None:
    Image.new("RGB", (201, 2)).save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda images: (images / "fox").mkdir(), "images/fox: no picture, expected .", id="empty"
        ),
        pytest.param(
            lambda images: draw(images / "1.png", 1),
            "images: expected a folder for each class, or --csv; found '1.png'",
            id="loose",
        ),
        pytest.param(lambda images: draw(images / "_/9.png", 9), "_/9.png: 'answer' is empty", id="no name"),
        pytest.param(
            lambda images: draw(images / "<image>/9.png", 9),
            "<image>/9.png: 'caption' has <image> in it",
            id="marker",
        ),
        pytest.param(
            lambda images: (images / "dog/10.png").write_text("no"),
            "dog/10.png: cannot read image",
            id="broken picture",
        ),
        pytest.param(
            lambda images: images.rename(images.with_name("elsewhere")),
            "images: expected a folder for each class, or --csv; found none",
            id="no class",
        ),
    ],
)
def test_bad_class_folders_are_one_line(make, classes, tmp_path, change, message):
    change(classes)
    error = make(expect=1)

    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_all_alike_are_not_split(make, tmp_path):
    for number in range(6):
        draw(tmp_path / f"images/{'ab'[number % 2]}/{number}.jpg", 0, quality=60 + number)
    error = make(expect=1)

    found = "as the smallest group of near-duplicates has 6 of 6 pictures; 0 holds out none"
    assert error == f"error: --eval_share 0.1: none can be held out, {found}\n"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        pytest.param(
            ["--eval_share", "1"], 2, "--eval_share must be at least 0 and below 1, found 1.0", id="all"
        ),
        pytest.param(["--eval_share", "nan"], 2, "--eval_share must be at least 0", id="NaN"),
        pytest.param(["--csv", "no.csv"], 1, "--csv no.csv: [Errno 2] No such file", id="no table"),
        pytest.param(["--out_dir", "images"], 1, "--out_dir images holds other files, 'big_cat'", id="full"),
        pytest.param(["--out_dir", "notes"], 1, "--out_dir notes: [Errno 20] Not a directory", id="a file"),
        pytest.param(["--out_dir", "notes/d"], 1, "cannot be written: ", id="a file in the way"),
    ],
)
def test_flags_that_cannot_be_are_one_line(make, classes, monkeypatch, tmp_path, flags, code, message):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    error = make("--images_path", "images", *flags, expect=code)

    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert (tmp_path / "notes").read_text() == "mine" and len(list(classes.rglob("*.*"))) == 10


def test_what_was_made_before_stays_until_all_is_well_and_is_then_replaced(make, classes, table, tmp_path):
    captions = table("file,caption\n0.png,a\n1.png,b\n")
    make("--csv", captions)
    before = all_bytes(tmp_path / "out")
    make("--csv", table("file,caption\n0.png,a\n1.png,\n"), expect=1)
    assert all_bytes(tmp_path / "out") == before

    make("--csv", table(HEADER + "0.png,Who?,a\n1.png,Who?,b\n"))
    assert sorted(all_bytes(tmp_path / "out")) == ["sft.jsonl", "sft_val.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "labels.csv", "out"]


def test_groups_are_those_of_every_pair_compared():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    for _ in range(3):  # chains of steps of up to four bits, some of which are too far
        flips = [
            sum(1 << int(bit) for bit in generator.choice(64, generator.integers(0, 5), replace=False))
            for _ in hashes
        ]
        hashes = np.concatenate([hashes, hashes[:300] ^ np.array(flips[:300], dtype=np.uint64)])
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= make_data.NEAR_BITS
    for _ in range(8):
        near = (near.astype(np.float32) @ near) > 0
    groups = np.array(make_data.near_groups(hashes))

    assert 300 < len(set(groups.tolist())) < 1200
    assert np.array_equal(groups[:, None] == groups, near)


@pytest.mark.slow
@pytest.mark.parametrize("shared_bits", [0, 16, 40], ids=lambda bits: f"{bits} bits alike")
def test_a_hundred_thousand_pictures_are_grouped_in_a_minute(shared_bits):
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64) >> np.uint64(shared_bits)
    start = time.process_time()  # of one core: the machine may be shared
    make_data.near_groups(hashes)

    assert time.process_time() - start < 60


@pytest.fixture
def follow(run, tmp_path) -> Callable[..., dict]:
    """Types the commands of the README's section in a folder that has my_pictures and out/demo/lm_128.pth;
    follow({"train_sft_vlm.py": [FLAG, ...]}) adds flags to some of them. What is in the report at the end."""
    (tmp_path / "model").symlink_to(ROOT / "model")

    def follow(more: dict[str, list]) -> dict:
        _, section = read("README.md").split(HEADING)
        (code,) = (code for language, code in FENCE.findall(section.split("\n## ")[0]) if language == "bash")
        for line in code.splitlines():
            _, script, *flags = shlex.split(line)
            run(script, *flags, *more.get(Path(script).name, []), folder=tmp_path, timeout=1200)
        return json.loads((tmp_path / "out/mine/report.json").read_text())

    return follow


def test_training_and_evaluation_read_what_was_written(follow, classes, tokenizer, tmp_path):
    draw(classes / "dog/a, b.png", 20)
    classes.rename(tmp_path / "my_pictures")
    sizes = dict(num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=128, **sizes))
    about = describe(model, tokenizer, "lm", 1, {})
    save_weights(tmp_path / "out/demo/lm_128.pth", half_state(model.state_dict()), about)
    flags = ["--device", "cpu", "--num_workers", 0]
    train = [*flags, "--max_steps", 2, "--batch_size", 5, "--log_interval", 1, "--save_interval", 9]
    report = follow(
        {"make_data.py": ["--eval_share", 0.2], "train_pretrain_vlm.py": train, "train_sft_vlm.py": train}
    )

    for stage in ("pretrain_vlm", "sft_vlm"):
        metrics = rows(tmp_path / f"out/mine/runs/{stage}_128/metrics.jsonl")
        assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    assert report["n"] == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nine_of_ten_digits_are_named_that_were_held_out(follow, run, tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets", reason="pip install scikit-learn -c constraints.txt")
    digits = sklearn.load_digits()  # (1797, 8, 8), values from 0 to 16
    names = "zero one two three four five six seven eight nine".split()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = tmp_path / "my_pictures" / names[digit] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
        picture.resize((96, 96), Image.Resampling.BICUBIC).save(path)
    demo = ["--out_dir", tmp_path / "out/demo"]
    run("scripts/demo/make_demo_data.py", "--out_dir", tmp_path / "texts", "--pictures", 4000)
    lm = ["--data_path", tmp_path / "texts/lm.jsonl", "--learning_rate", 2e-3, "--max_steps", 300]
    run(
        "scripts/train_lm.py",
        *demo_sizes(),
        *lm,
        "--batch_size",
        16,
        "--warmup_iters",
        50,
        *demo,
        timeout=1200,
    )
    report = follow({"make_data.py": ["--eval_share", 397 / 1797]})

    learnt, held = (images(tmp_path / "my_data" / name) for name in ("sft.jsonl", "sft_val.jsonl"))
    assert (len(learnt), len(held), report["n"]) == (1400, 397, 397) and not learnt & held
    assert report["accuracy"] >= 0.9
