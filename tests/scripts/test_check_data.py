"""scripts/check_data.py: training's verdicts on all rows at once, figures that are right, clean copies."""

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, TINY_ENCODER, write_rows
from PIL import Image

import train_pretrain_vlm
from common.cli import run_main
from common.setup import build_vlm
from dataset.errors import DataError
from dataset.vlm_dataset import VLMDataset
from scripts.check_data import SMALL
from scripts.checks.figures import FREQUENT, Figures, summary
from scripts.checks.reading import Facts, Reading, digest, script_of

SCRIPT = "scripts/check_data.py"
LIMIT = 500
AT_SIGNS, LONG = "@" * 196, "word " * 900
PICTURE_MISSING, NO_PICTURE = "not found below", "not a picture, expected PNG"
RUN, TURN = "in a row: that means an image", "an assistant turn is empty"


def picture(size=(40, 32), kind="PNG", mode="RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


BROKEN = {  # content, and what is said of it
    "empty.png": (b"", NO_PICTURE),
    "text.png": (b"see attachment", NO_PICTURE),
    "page.jpg": (b"<!DOCTYPE html><title>404</title>", NO_PICTURE),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_PICTURE),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", NO_PICTURE),
    "cut.png": (picture()[:900], "truncated"),
    "cut.jpg": (picture((200, 200), "JPEG")[:2000], "truncated"),
    "line.png": (picture((404, 4)), "one side over 100 times the other"),
}
Cases = list[
    tuple[object, str, bool]
]  # a row or a line, part of what is said of it, whether it is structural


def turns(
    question="What is this?\n<image>", answer: object = "A thing.", role="role", content="content"
) -> list:
    users, assistants = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: users, content: question}, {role: assistants, content: answer}]


def ours() -> tuple[dict, Cases]:
    def row(image: object = "fine.png", **said) -> dict:
        return {"image": image, "conversations": turns(**said)}

    structural = [
        ("{", "not JSON"),
        (7, "expected an object, found int"),
        ({}, "expected a non-empty list 'conversations'"),
        ({"image": "fine.png", "conversations": "Hello"}, "found 'Hello', not JSON"),
        ({"text": " "}, "'text' must be text that is not blank"),
        ({"text": "\ud83d"}, "half of a surrogate pair"),
        ({"image": "fine.png", "text": "A thing."}, "a 'text' row has no images"),
        (row("gone.png"), PICTURE_MISSING),
        (row("fine.png, gone.png"), "was split at the comma"),
        (row(7), "must be a path or a list of paths, found 7"),
        (row("http://a/b.png"), "no picture is fetched from the network"),
        (row("fine.png") | {"images": ["other.png"]}, "has both 'image' and 'images'"),
        ({"image_path": "fine.png", "conversations": turns()}, "found 'image_path': 'fine.png'"),
        (row(question="<image><image>"), "2 <image> markers"),
        (row(answer="\n"), TURN),
        (row(answer=None), "'content' must be text, found None"),
        ({"conversations": [{"role": "bot", "content": "Hi"}]}, "unknown role 'bot'"),
    ]
    samples = [(row(name), said) for name, (_, said) in BROKEN.items()]
    samples += [({"text": AT_SIGNS}, RUN), (row(answer=AT_SIGNS), RUN)]
    samples += [(row(question=LONG), "no supervised token within 500 tokens")]
    return row(), [*((*case, True) for case in structural), *((*case, False) for case in samples)]


def release_3() -> tuple[dict, Cases]:
    """Rows as columns of Parquet: JSON, and a picture's bytes or those of several."""
    fine = picture()

    def row(images: object = (fine,), **said) -> dict:
        return {"conversations": json.dumps(turns(**said)), "image_bytes": images and list(images)}

    structural = [
        ({"conversations": None, "image_bytes": [fine]}, "found None"),
        ({"conversations": "Hello", "image_bytes": [fine]}, "found 'Hello', not JSON"),
        ({"conversations": "[]", "image_bytes": [fine]}, "expected a non-empty list"),
        ({"conversations": '["Hello"]', "image_bytes": [fine]}, "turn 1 is not an object"),
        (row([fine, fine]), "1 <image> markers in the user's turns, but 2 images"),
        (row(question="<image> <image>"), "2 <image> markers"),
        (row(answer=""), TURN),
        (row(answer=5), "'content' must be text, found 5"),
        ({"conversations": '[{"role": "tool", "content": "x"}]', "image_bytes": [fine]}, "role 'tool'"),
    ]
    samples = [(row([content]), said) for content, said in BROKEN.values()]
    samples += [(row(answer=AT_SIGNS), RUN), (row(question=f"<image>{LONG}"), "no supervised token")]
    return row(), [*((*case, True) for case in structural), *((*case, False) for case in samples)]


def messages() -> tuple[dict, Cases]:
    def row(*parts: object, images: object = ("fine.png",), answer: object = "A thing.") -> dict:
        said = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
        return {"images": list(images), "messages": said}

    shown, asked = {"type": "image"}, {"type": "text", "text": "What?"}
    structural = [
        ({"messages": []}, "expected a non-empty list 'messages'"),
        ({"messages": ["Hello"]}, "turn 1 is not an object"),
        (row({"type": "video"}, asked), "expected a part 'text', 'image' or 'image_url'"),
        (row("What?"), "expected a part 'text', 'image' or 'image_url'"),
        (row(shown, shown, asked), "an image part more than the row has pictures"),
        (row({"type": "image", "path": "gone.png"}, asked, images=()), PICTURE_MISSING),
        (row({"type": "image_url", "image_url": {"url": "data:,?"}}, images=()), "cannot read image"),
        (row({"type": "image_url", "image_url": {"url": "https://a/b.png"}}, images=()), "from the network"),
        (row(shown, asked, answer=[shown | {"path": "fine.png"}]), "expected in the user's turns"),
        (row(shown, asked, answer=""), TURN),
        ({"messages": [{"role": "developer", "content": "x"}]}, "unknown role 'developer'"),
    ]
    samples = [
        (row({"type": "image", "path": name}, asked, images=()), said) for name, (_, said) in BROKEN.items()
    ]
    samples += [(row(shown, {"type": "text", "text": AT_SIGNS}), RUN)]
    samples += [(row(shown, {"type": "text", "text": LONG}), "no supervised token")]
    return row(shown, asked), [*((*case, True) for case in structural), *((*case, False) for case in samples)]


def imagefolder() -> tuple[dict, Cases]:
    def row(name: object = "fine.png", text: object = "A thing.") -> dict:
        return {"file_name": name, "text": text}

    structural = [
        ({"file_name": "fine.png"}, "expected a non-empty list 'conversations'"),
        (row("gone.png"), PICTURE_MISSING),
        ({"file_names": ["fine.png", "gone.png"], "text": "A thing."}, PICTURE_MISSING),
        (row(text="  "), TURN),
        (row(text=5), "'content' must be text, found 5"),
        (row(5), PICTURE_MISSING),
    ]
    samples = [(row(name), said) for name, (_, said) in BROKEN.items()] + [(row(text=AT_SIGNS), RUN)]
    return row(), [*((*case, True) for case in structural), *((*case, False) for case in samples)]


LAYOUTS = {"ours": ours, "release 3": release_3, "messages": messages, "imagefolder": imagefolder}
CASES = [(layout, number) for layout, make in LAYOUTS.items() for number in range(len(make()[1]))]
STRUCTURAL = [case for case in CASES if LAYOUTS[case[0]]()[1][case[1]][2]]


def write(folder: Path, layout: str, rows: list) -> Path:
    if layout == "release 3":
        schema = pa.schema([("conversations", pa.string()), ("image_bytes", pa.list_(pa.binary()))])
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "rows.parquet")
        return folder / "rows.parquet"
    path = folder / ("metadata.jsonl" if layout == "imagefolder" else "rows.jsonl")
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def where(path: Path, number: int) -> str:
    return f"{path.name}[{number}]" if path.suffix == ".parquet" else f"{path.name}:{number + 1}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"fine.png": picture(), "other.png": picture((48, 48))}.items():
        (tmp_path / name).write_bytes(content)
    for name, (content, _) in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def checking(path: Path, *more) -> list:
    flags = ["--images_path", path.parent, "--out_dir", path.parent / "check", "--num_workers", 0]
    return [
        SCRIPT,
        "--data_path",
        path,
        *flags,
        "--vision_model_path",
        TINY_ENCODER,
        "--max_seq_len",
        LIMIT,
        *more,
    ]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def call(monkeypatch, capsys) -> Callable:
    """Runs an entry point in this process: exit code and the line about an error."""

    def call(main: Callable, *arguments) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return end.value.code, re.findall("^error: (.*)", captured.err, re.MULTILINE)

    return call


def training(path: Path, mode: str) -> list:
    given = ["--data_path", path, "--images_path", path.parent, "--out_dir", path.parent / "out"]
    flags = ["--from_weight", "none", "--max_seq_len", LIMIT, "--epochs", 1, "--batch_size", 8]
    return [*given, *TINY, *flags, "--on_bad_sample", mode]


def test_the_corpus_has_over_60_bad_rows():
    assert len(CASES) > 60 and len(LAYOUTS) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_bad_rows_are_listed_with_what_training_says(layout, folder, run):
    fine, cases = LAYOUTS[layout]()
    path = write(folder, layout, [fine, *(row for row, _, _ in cases), fine])
    result = run(*checking(path), expect=1)
    assert "Traceback" not in result.stderr
    bad = lines_of(folder / "check/bad_rows.jsonl")
    assert [line["where"] for line in bad] == [where(path, number) for number in range(1, len(cases) + 1)]
    for line, (_, message, is_structural) in zip(bad, cases, strict=True):
        assert line["error"].startswith(f"{line['where']}: ") and message in line["error"]
        assert line["structural"] is is_structural
    report = json.loads((folder / "check/report.json").read_text())
    structural = sum(is_structural for _, _, is_structural in cases)
    assert report["bad_rows"] == {"structure": structural, "samples": len(cases) - structural}
    assert (report["rows"], report["good_rows"]) == (len(cases) + 2, 2)
    assert sum(reason["rows"] for reason in report["bad_reasons"]) == len(cases)


@pytest.fixture(scope="module")
def trained_with(tokenizer):
    return build_vlm(SMALL, str(TINY_ENCODER), tokenizer)[1]


@pytest.mark.parametrize(
    ("layout", "number"), STRUCTURAL, ids=[f"{name} {number}" for name, number in STRUCTURAL]
)
def test_a_bad_structure_ends_training_with_the_same_words(layout, number, folder, run, trained_with):
    fine, cases = LAYOUTS[layout]()
    path = write(folder, layout, [fine, cases[number][0]])
    with pytest.raises(DataError) as caught:
        VLMDataset([path], trained_with, LIMIT, folder)
    reading = Reading([path], trained_with, LIMIT, folder, True, folder)
    first, second = reading.verdicts(0, "")
    assert (first.error, second.is_structural) == ("", True)
    assert re.sub(r" \(\d+ of \d+ pictures are missing\)$", "", str(caught.value)) == second.error


@pytest.mark.parametrize("mode", ["skip", "error"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_structure_ends_a_run_before_its_first_step(layout, mode, folder, call):
    fine, cases = LAYOUTS[layout]()
    path = write(folder, layout, [fine, cases[0][0]])
    code, (error,) = call(train_pretrain_vlm.main, *training(path, mode))
    assert code == 1 and error.startswith(where(path, 1)) and cases[0][1] in error
    assert not list(folder.glob("out/**/metrics.jsonl"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_skips_the_samples_that_are_listed(layout, folder, call, run):
    fine, cases = LAYOUTS[layout]()
    rows = [fine, *(row for row, _, is_structural in cases if not is_structural)]
    path = write(folder, layout, rows)
    run(*checking(path), expect=1)
    listed = [line["error"] for line in lines_of(folder / "check/bad_rows.jsonl")]
    assert call(train_pretrain_vlm.main, *training(path, "skip")) == (0, [])
    runs = folder / "out/runs/pretrain_vlm_64"
    assert sorted(line["error"] for line in lines_of(runs / "bad_samples.jsonl")) == sorted(listed)
    summary = json.loads((runs / "summary.json").read_text())
    assert (summary["rows"], summary["skipped_rows"]) == (1, len(rows) - 1)
    code, (error,) = call(train_pretrain_vlm.main, *training(path, "error"), "--resume", "never")
    assert code == 1 and error in listed


def checked(call_or_run: Callable, path: Path, *more, expect: int = 0) -> dict:
    call_or_run(*checking(path, *more), expect=expect)
    return json.loads((path.parent / "check/report.json").read_text())


@pytest.fixture
def counted_rows(folder) -> Path:
    """Six rows: two are the same, two show copies of a picture, one is cut in its answer, one is text."""
    (folder / "copy.png").write_bytes((folder / "fine.png").read_bytes())
    rows = [
        {"image": "fine.png", "conversations": turns(answer="Yes.")},
        {"image": "copy.png", "conversations": turns(answer="Yes.")},
        {"image": "other.png", "conversations": turns(answer="No.")},
        {"conversations": turns("Kann es das?", LONG)},
        {"conversations": turns("これは何？", "猫です。")},
        {"text": "你好，世界"},
    ]
    return write_rows(folder / "rows.jsonl", rows)


def test_figures_are_those_of_the_rows(counted_rows, run):
    report = checked(run, counted_rows)
    assert (report["rows"], report["good_rows"], report["duplicate_rows"]) == (6, 6, 1)
    pictures = report["pictures"]
    assert [pictures[name] for name in ("rows", "shown", "distinct")] == [3, 3, 2]
    assert (pictures["copies_under_other_names"], pictures["modes"], pictures["formats"]) == (
        1,
        {"RGB": 3},
        {"PNG": 3},
    )
    assert (pictures["shorter_side"]["min"], pictures["shorter_side"]["p100"]) == (32, 48)
    assert report["scripts"] == {"Latin": 4, "Japanese": 1, "Han": 1}
    assert report["tokens"]["cut_rows"] == 1 and report["tokens"]["p100"] > LIMIT
    answers = report["answers"]
    assert (answers["count"], answers["distinct"], answers["cut"], answers["majority"]) == (5, 4, 1, 0.4)
    assert answers["most_frequent"] == [{"answer": "Yes.", "count": 2}]


def test_supervised_tokens_are_those_of_training(counted_rows, run, trained_with):
    samples = VLMDataset([counted_rows], trained_with, LIMIT, counted_rows.parent)
    expected = [sum(label != -100 for label in samples[i].labels[1:]) for i in range(6)]
    assert checked(run, counted_rows)["supervised_tokens"]["mean"] == round(sum(expected) / 6, 2)


def test_without_decoding_a_broken_picture_is_only_looked_for(folder, run):
    rows = [{"image": name, "conversations": turns()} for name in ("cut.png", "gone.png")]
    report = checked(run, write_rows(folder / "rows.jsonl", rows), "--no_decode", expect=1)
    assert report["bad_rows"] == {"structure": 1, "samples": 0}
    assert report["pictures"]["shorter_side"] is None


def test_workers_find_what_one_process_finds(folder, run):
    for layout in ("ours", "release 3"):
        fine, cases = LAYOUTS[layout]()
        path = write(folder, layout, [fine, *(row for row, _, _ in cases)] * 5)
        alone = checked(run, path, expect=1), (folder / "check/bad_rows.jsonl").read_bytes()
        shared = (
            checked(run, path, "--num_workers", 2, expect=1),
            (folder / "check/bad_rows.jsonl").read_bytes(),
        )
        assert alone[1] == shared[1]
        assert alone[0] | {"seconds": 0} == shared[0] | {"seconds": 0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.json", b"[{]", "a.json: not JSON"),
        ("a.jsonl", b"\x1f\x8b", "is gzip"),
        ("a.parquet", b"PAR1\x15\x04", "Parquet that cannot be read"),
        ("gone.jsonl", None, "does not exist"),
    ],
    ids=["empty", "no list", "gzip", "cut", "missing"],
)
def test_a_file_that_cannot_be_read_is_listed_and_the_next_one_checked(name, content, message, folder, run):
    if content is not None:
        (folder / name).write_bytes(content)
    path = write_rows(folder / "fine.jsonl", [{"text": "A thing."}])
    report = checked(run, path, "--data_path", folder / name, path, expect=1)
    (line,) = lines_of(folder / "check/bad_rows.jsonl")
    assert report["rows"] == 1 and report["broken_files"] == [line["error"]]
    assert line["file"] == str(folder / name) and line["where"] is None and message in line["error"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_seq_len", 0], "--max_seq_len must be at least 1, found 0"),
        (["--num_workers", -1], "--num_workers must be at least 0"),
        (["--data_path"], "expected at least one argument"),
    ],
    ids=["length", "workers", "no data"],
)
def test_wrong_usage_is_exit_code_2(folder, run, flags, message):
    result = run(*checking(folder / "rows.jsonl"), *flags, expect=2)
    assert message in result.stderr and "Traceback" not in result.stderr


def test_text_needs_no_encoder_and_refuses_pictures(folder, run):
    rows = [{"text": "A thing."}, {"image": "fine.png", "conversations": turns()}]
    path = write_rows(folder / "rows.jsonl", rows)
    assert checked(run, path, "--vision_model_path", "none", expect=1)["bad_rows"]["structure"] == 1
    (line,) = lines_of(folder / "check/bad_rows.jsonl")
    assert line["error"].endswith("has images, but only text can be trained on here")


def test_overlap_with_evaluation_is_by_content_and_question(folder, run):
    (folder / "copy.png").write_bytes((folder / "fine.png").read_bytes())
    path = write_rows(folder / "rows.jsonl", [{"image": "fine.png", "conversations": turns()}])
    held_out = [
        {"image": "copy.png", "conversations": turns(answer="Other.")},
        {"image": "copy.png", "conversations": turns("Where is it?")},
        {"image": "other.png", "conversations": turns()},
    ]
    held_out = write_rows(folder / "eval.jsonl", held_out)
    overlap = checked(run, path, "--eval_data_path", held_out)["overlap"]
    assert overlap["shared"] == [
        {"where": "eval.jsonl:1", "shares": ["picture", "question"]},
        {"where": "eval.jsonl:2", "shares": ["picture"]},
    ]
    assert (overlap["rows"], overlap["rows_with_a_picture_of_training"]) == (3, 2)


def test_a_bad_row_of_evaluation_counts_too(folder, run):
    path = write_rows(folder / "rows.jsonl", [{"text": "A thing."}])
    held_out = write_rows(folder / "eval.jsonl", [{"text": " "}])
    report = checked(run, path, "--eval_data_path", held_out, expect=1)
    assert report["overlap"]["bad_rows"] == 1 and sum(report["bad_rows"].values()) == 0


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("A deer.", "Latin"),
        ("\uff21\uff22", "Latin"),
        ("\u4e00\u53ea\u9e7f A", "Han"),
        ("\u9e7f\u3067\u3059", "Japanese"),
        ("\u041e\u043b\u0435\u043d\u044c", "Cyrillic"),
        ("12 + 3", "no letters"),
        ("\ud83d", "no letters"),
    ],
)
def test_a_row_has_the_script_of_most_letters(text, script):
    assert script_of([text]) == script


def test_frequent_answers_are_found_among_very_many():
    figures = Figures()
    for number in range(3 * FREQUENT):
        text = "Yes." if number % 3 == 0 else f"Answer {number}."
        figures.add(Facts(0, "x:1", answers=[(digest(text), text)]))
    answers = figures.report()["answers"]
    assert answers["most_frequent"] == [{"answer": "Yes.", "count": FREQUENT}]
    assert answers["majority"] == pytest.approx(1 / 3) and len(figures.texts) <= FREQUENT


def test_a_summary_has_percentiles_and_bins_of_equal_width():
    found = summary({value: 1 for value in range(1, 101)})
    assert (found["mean"], found["min"], found["p50"], found["p95"], found["p100"]) == (50.5, 1, 50, 95, 100)
    bins = found["histogram"]
    assert sum(bins["count"]) == 100 and len({*np.diff(bins["from"])}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clean_copy_has_the_good_rows_once_and_the_original_stays(layout, folder, run):
    fine, cases = LAYOUTS[layout]()
    path = write(folder, layout, [fine, *(row for row, _, _ in cases), fine])
    before = path.read_bytes()
    clean = folder / "clean"
    result = run(*checking(path, "--fix", clean), expect=1)
    assert f"{clean / path.name}: 1 of {len(cases) + 2} rows" in result.stdout
    assert path.read_bytes() == before
    report = checked(run, clean / path.name, "--images_path", folder)
    assert (report["rows"], report["good_rows"], report["pictures"]["rows"]) == (1, 1, 1)


def test_a_clean_copy_of_a_json_list_and_of_a_folder_keeps_names(folder, run):
    (folder / "data/part").mkdir(parents=True)
    (folder / "data/a.json").write_text(json.dumps([{"text": "A thing."}, 5]))
    (folder / "data/part/b.json").write_text(json.dumps([{"text": "A thing."}, {"text": "Another."}]))
    run(*checking(folder / "data"), "--fix", folder / "clean", expect=1)
    assert json.loads((folder / "clean/a.json").read_text()) == [{"text": "A thing."}]
    assert json.loads((folder / "clean/part/b.json").read_text()) == [{"text": "Another."}]


@pytest.mark.parametrize("names", [["a/x.jsonl", "b/x.jsonl"], ["x.jsonl"]], ids=["one name", "itself"])
def test_a_clean_copy_overwrites_nothing_that_is_checked(names, folder, run):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        write_rows(folder / name, [{"text": "A thing."}])
    result = run(
        *checking(folder), "--data_path", *(folder / name for name in names), "--fix", folder, expect=1
    )
    assert re.search("^error: --fix .*: ", result.stderr, re.MULTILINE)
    assert json.loads((folder / names[0]).read_text()) == {"text": "A thing."}


def test_the_page_shows_what_the_model_sees(folder, run, trained_with):
    rows = [{"image": "fine.png", "conversations": turns(answer="<b>A thing.")}, 5]
    path = write_rows(folder / "rows.jsonl", rows)
    checked(run, path, expect=1)
    page = (folder / "check/index.html").read_text()
    assert '<mark class="image">&lt;196 x @&gt;</mark>' in page
    assert '<mark class="learnt">&lt;b&gt;A thing.&lt;|im_end|&gt;\n</mark>' in page
    assert "rows.jsonl:2: expected an object, found int" in page
    (uri,) = re.findall('src="data:image/png;base64,([^"]*)"', page)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
    samples = VLMDataset([write_rows(folder / "fine.jsonl", rows[:1])], trained_with, LIMIT, folder)
    assert (shown == samples[0].pixel_values[0].permute(1, 2, 0).numpy()).all()
