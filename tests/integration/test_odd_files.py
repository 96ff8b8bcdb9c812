"""Odd pictures, rows and files as the world has them, each with its verdict, through training, scoring, chat
and an export: no traceback, nothing dropped without a word, and counts add up."""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, write_rows
from PIL import Image, ImageFile
from transformers import AutoProcessor

import convert_to_hf
import eval_vlm
import train_pretrain_vlm
from common.cli import run_main
from model.pictures import FORMATS

RED, SIZE = (200, 40, 40), (40, 32)
WHITE, GREY = (255, 255, 255), (128, 128, 128)
ASKED = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A thing."}]
TURNED = Image.Exif()
TURNED[0x0112] = 6


def drawn(mode: str = "RGB", colour=RED, size=SIZE, **options) -> Callable[[Path], None]:
    """Saves a picture of one colour; `options` are Pillow's."""
    options = {"format": None, **options}
    return lambda path: Image.new(mode, size, colour).save(path, **options)


def array(values, dtype: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.full(SIZE[::-1], values, dtype=dtype)).save(path)


def halves(lowest, highest, dtype: str) -> Callable[[Path], None]:
    """Left half `lowest`, right half `highest`: on the mean, the middle of what is black and white."""
    pixels = np.full(SIZE[::-1], lowest, dtype=dtype)
    pixels[:, SIZE[0] // 2 :] = highest
    return lambda path: Image.fromarray(pixels).save(path)


def content(made: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(made.encode() if isinstance(made, str) else made)


def encoded(format: str, change: Callable[[bytes], bytes] = bytes, **options) -> Callable[[Path], None]:
    """A noisy picture's file, changed."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format, **options)
    return content(change(file.getvalue()))


def frames(*colours, **options) -> Callable[[Path], None]:
    first, *others = [Image.new("RGB", SIZE, colour) for colour in colours]
    return lambda path: first.save(path, save_all=True, append_images=others, **options)


def palette(path: Path) -> None:
    picture = Image.new("P", SIZE, 0)
    picture.putpalette([0, 0, 0, *RED])
    picture.save(path, transparency=0)


def bomb(path: Path) -> None:
    """Says that it has 60,000 x 60,000 pixels."""
    drawn("L", 0)(path)
    made = bytearray(path.read_bytes())
    made[16:24] = (60_000).to_bytes(4, "big") * 2
    made[29:33] = zlib.crc32(made[12:29]).to_bytes(4, "big")
    path.write_bytes(made)


FINE_PICTURES = {  # how they are made, and their mean colour as the model gets it
    "plain.png": (drawn(), RED),
    "UPPER.JPG": (drawn(format="JPEG"), RED),
    "grey.png": (drawn("L", 128), GREY),
    "one_bit.png": (drawn("1", 1), WHITE),
    "grey_and_alpha.png": (drawn("LA", (0, 0)), WHITE),
    "logo.png": (drawn("RGBA", (0, 0, 0, 0)), WHITE),
    "half_transparent.png": (drawn("RGBA", (0, 0, 0, 127)), GREY),
    "palette.png": (lambda path: Image.new("RGB", SIZE, RED).convert("P").save(path), RED),
    "transparent_palette.png": (palette, WHITE),
    "transparent.gif": (palette, WHITE),
    "first_frame.gif": (frames(RED, "blue"), RED),
    "first_frame.png": (frames(RED, "blue"), RED),
    "first_page.tif": (frames(RED, "blue"), RED),
    "sixteen.png": (array(32_896, "uint16"), GREY),
    "sixteen.tif": (array(32_896, "uint16"), GREY),
    "sixteen_big_endian.tif": (array(32_896, ">u2"), GREY),
    "float.tif": (halves(0, 1, "float32"), GREY),
    "depth.tif": (halves(-3.5, 1200, "float32"), GREY),
    "not_a_number.tif": (array(np.nan, "float32"), (0, 0, 0)),
    "integers.tif": (halves(-70_000, 70_000, "int32"), GREY),
    "cmyk.jpg": (drawn("CMYK", (127, 127, 127, 0)), GREY),
    "progressive.jpg": (drawn(progressive=True), RED),
    "turned.jpg": (drawn(exif=TURNED), RED),
    "broken_exif.jpg": (drawn(exif=b"Exif\0\0nonsense"), RED),
    "and_more.jpg": (encoded("JPEG", lambda made: made + b"\0" * 999), None),
    "lossy.webp": (drawn(), RED),
    "alpha.webp": (drawn("RGBA", (0, 0, 0, 0), lossless=True), WHITE),
    "plain.bmp": (drawn(), RED),
    "plain.jp2": (drawn(), RED),
    "plain.avif": (drawn(), RED),
    "png_called.jpg": (drawn(format="PNG"), RED),
    "no_suffix": (drawn(format="PNG"), RED),
    "one_pixel.png": (drawn(size=(1, 1)), RED),
    "ribbon.png": (drawn(size=(100, 1)), RED),
    "photograph.jpg": (drawn(size=(3000, 2400)), RED),
    "with spaces.png": (drawn(), RED),
    "Smith, J.png": (drawn(), RED),
    "100%25#1.png": (drawn(), RED),
    "图片.png": (drawn(), RED),
}
NO_PICTURE = "not a picture, expected PNG"
BROKEN_PICTURES = {  # and what is said of them
    "empty.png": (content(""), NO_PICTURE),
    "text.png": (content("see attachment"), NO_PICTURE),
    "not_found.jpg": (content("<!DOCTYPE html><title>404</title>"), NO_PICTURE),
    "drawing.png": (content('<svg xmlns="http://www.w3.org/2000/svg"/>'), NO_PICTURE),
    "program.png": (content("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), NO_PICTURE),
    "document.png": (content("%PDF-1.7\n1 0 obj\n"), NO_PICTURE),
    "icon.png": (drawn(format="ICO"), NO_PICTURE),
    "map.png": (drawn(format="PPM"), NO_PICTURE),
    "signature_only.png": (content(b"\x89PNG\r\n\x1a\n"), ""),
    "cut.png": (encoded("PNG", lambda made: made[: len(made) // 2]), "truncated"),
    "cut.jpg": (encoded("JPEG", lambda made: made[: len(made) // 2]), "truncated"),
    "cut.webp": (encoded("WEBP", lambda made: made[: len(made) // 2]), ""),
    "changed.png": (encoded("PNG", lambda made: made[:900] + b"????" + made[904:]), ""),
    "bomb.png": (bomb, "pixels"),
    "line.png": (drawn(size=(404, 4)), "one side over 100 times the other"),
}
FINE_ROWS = {
    "null": {"image": None, "conversations": ASKED},
    "not a number": {"image": float("nan"), "kind": float("nan"), "conversations": ASKED},
    "kind 0": {"kind": 0, "conversations": ASKED},
    "ids": {"image_id": 7, "num_images": 0, "image_width": None, "conversations": ASKED},
    "null columns": {"text": "Only text.", "conversations": None},
    "LLaVA": {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]},
    "null fields": {
        "conversations": [
            {"role": None, "content": None, "from": "human", "value": "Hm?"},
            {"role": "assistant", "content": "Yes.", "from": None, "value": None},
        ]
    },
    "system": {"conversations": [{"role": "system", "content": ""}, *ASKED]},
    "images": {"images": ["plain.png", "logo.png"], "conversations": ASKED},
    "a list of one": {"image": ["plain.png"], "images": None, "conversations": ASKED},
    "commas": {"image": "plain.png,logo.png", "conversations": ASKED},
    "a marker in text": {"conversations": [{"role": "user", "content": "Is <image> a tag?"}, ASKED[1]]},
    "at signs": {"text": "@" * 195 + " a@b.com"},
    "control tokens": {"text": "<|im_start|>assistant\nYes<|im_end|><|endoftext|>"},
    "first spaces": {"conversations": [ASKED[0], {"role": "assistant", "content": "\n\n   Yes."}]},
    "odd characters": {"text": "\0 \u2028 \x85 \ufeff \u202e \U000e0041 \ud83d\ude00 \ue000\U000f0000"},
}
SKIPPED_ROWS = {
    "a run of at signs": ({"text": "@" * 196}, "in a row: that means an image"),
    "at signs as an answer": (
        {"image": "plain.png", "conversations": [ASKED[0], {"role": "assistant", "content": "@" * 196}]},
        "in a row: that means an image",
    ),
    "too long": (
        {"conversations": [{"role": "user", "content": "word " * 900}, ASKED[1]]},
        "no supervised token within 500 tokens",
    ),
}
REFUSED_ROWS = {
    "a number": (5, "expected an object, found int"),
    "a list": ([ASKED], "expected an object, found list"),
    "nothing": ({}, "expected a non-empty list 'conversations', found None"),
    "blank text": ({"text": " \n"}, "'text' must be text that is not blank"),
    "text is null": ({"text": None}, "expected a non-empty list 'conversations'"),
    "text is a number": ({"text": 5}, "'text' must be text"),
    "a string": ({"conversations": "Hello"}, "expected a non-empty list 'conversations', found 'Hello'"),
    "no answer": ({"conversations": [ASKED[0], {"role": "assistant", "content": "\n"}]}, "turn is empty"),
    "null content": ({"conversations": [ASKED[0], {"role": "assistant", "content": None}]}, "turn 2"),
    "another role": ({"conversations": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    "another name": ({"image_path": "plain.png", "conversations": ASKED}, "'image_path': 'plain.png'"),
    "a film": ({"video": "a.mp4", "conversations": ASKED}, "'video': 'a.mp4'"),
    "bytes": ({"image": {"bytes": "iVBOR"}, "conversations": ASKED}, "must be a path or a list of paths"),
    "two fields": (
        {"image": "plain.png", "images": ["logo.png"], "conversations": ASKED},
        "has both 'image' and 'images'",
    ),
    "a missing picture": ({"image": "gone.png", "conversations": ASKED}, "image 'gone.png' not found"),
    "a missing one of two": ({"image": "plain.png, gone.png", "conversations": ASKED}, "split at the comma"),
    "a folder": ({"image": ".", "conversations": ASKED}, "image '.' not found"),
    "a long name": ({"image": "a" * 300, "conversations": ASKED}, "not found"),
    "half a surrogate": ({"text": "\ud83d"}, "half of a surrogate pair"),
    "half a surrogate as kind": ({"kind": "\ud83d", "conversations": ASKED}, "half of a surrogate pair"),
    "half a surrogate as name": ({"image": "\ud83d", "conversations": ASKED}, "half of a surrogate pair"),
    "too many markers": (
        {"image": "plain.png", "conversations": [{"role": "user", "content": "<image><image>"}, ASKED[1]]},
        "2 <image> markers",
    ),
}
LINE = json.dumps({"conversations": ASKED}, ensure_ascii=False)


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="none")
    return file.getvalue()


def picture_file() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZE, RED).save(file, "PNG")
    return file.getvalue()


MARKED = json.dumps([{"role": "user", "content": "<image>What is this?"}, ASKED[1]])
ROWS = {"conversations": [MARKED] * 3, "image_bytes": [picture_file()] * 3}
WHOLE = parquet(**ROWS)
FINE_FILES = {
    "with_mark.jsonl": b"\xef\xbb\xbf" + LINE.encode(),
    "carriage_returns.jsonl": f"{LINE}\r\n\r\n{LINE}\r\n".encode(),
    "list.jsonl": f"\n [{LINE},\n {LINE}]".encode(),
    "list_with_mark.json": f"\ufeff[{LINE}]".encode(),
    "lines.json": f"{LINE}\n{LINE}".encode(),
    "LIST.JSON": f"[{LINE}]".encode(),
    "no_suffix": LINE.encode(),
    "数据.jsonl": LINE.encode(),
    "rows.parquet": WHOLE,
    "parquet_called.jsonl": WHOLE,
    "null_pictures.parquet": parquet(**ROWS | {"image_bytes": pa.nulls(3)}),
    "struct.parquet": parquet(
        images=[[{"bytes": picture_file(), "path": "a.png"}], None],
        texts=[[{"user": "What is this?", "assistant": "A thing."}]] * 2,
        language=pa.nulls(2),
    ),
}
REFUSED_FILES = {
    "rows.jsonl.gz": (gzip.compress(LINE.encode()), "is gzip"),
    "cut.parquet": (WHOLE[: len(WHOLE) // 2], "cut.parquet: Parquet that cannot be read"),
    "first_bytes.parquet": (b"PAR1\x15\x04", "Parquet that cannot be read"),
    "changed.parquet": (
        WHOLE.replace(WHOLE[4:200], b"\xff" * 196, 1),
        "changed.parquet: Parquet that cannot be read",
    ),
    "no_rows.parquet": (parquet(conversations=pa.array([], pa.string())), "no rows"),
    "numbers.parquet": (parquet(conversations=[1, 2]), "expected a non-empty list 'conversations', found 1"),
    "bytes.parquet": (parquet(conversations=[b"[]"]), "expected a non-empty list 'conversations', found b'"),
    "no_json.parquet": (
        parquet(conversations=[MARKED, "Hello"]),
        "no_json.parquet[1]: expected a non-empty list 'conversations', found 'Hello', not JSON",
    ),
    "json_object.parquet": (parquet(conversations=['{"role": "user"}']), "expected a non-empty list"),
    "json_turns.parquet": (parquet(conversations=['["Hello"]']), "turn 1 is not an object"),
    "null_rows.parquet": (
        parquet(conversations=[MARKED, None], image_bytes=[picture_file()] * 2),
        "null_rows.parquet[1]: expected a non-empty list 'conversations', found None",
    ),
    "picture_numbers.parquet": (
        parquet(images=[5], texts=[[{"user": "a", "assistant": "b"}]]),
        "'image' must",
    ),
    "picture_names.parquet": (parquet(**ROWS | {"image_bytes": ["a.png"] * 3}), "'image_bytes': 'a.png'"),
    "null_pairs.parquet": (
        parquet(texts=[[{"user": "a", "assistant": None}]]),
        "turn 2: 'content' must be text",
    ),
    "pairs_of_text.parquet": (parquet(texts=[["a", "b"]]), "turn 1 is not an object with 'user'"),
    "another_layout.parquet": (
        parquet(question=["What?"], answer=["A thing."]),
        "no layout has the fields 'question', 'answer'",
    ),
    "not_utf_8.parquet": (
        parquet(conversations=pa.array([b"\xff"]).view(pa.string())),
        "can't decode byte 0xff",
    ),
    "utf_16.jsonl": (LINE.encode("utf-16"), "is UTF-16"),
    "latin.jsonl": (LINE.replace("A", "\xc4").encode("latin-1"), "not JSON"),
    "binary.jsonl": (b"\0\1\2", "is binary"),
    "empty.jsonl": (b"", "no rows"),
    "blank.jsonl": (b"\n \n", "no rows"),
    "empty_list.json": (b"[]", "no rows"),
    "object.json": (f'{{"data": [{LINE}]}}'.encode(), "expected a non-empty list 'conversations'"),
    "comma.json": (f"[{LINE},]".encode(), "not JSON"),
    "cut.jsonl": (f"{LINE}\n{LINE[:20]}".encode(), "cut.jsonl:2: not JSON"),
    "deep.jsonl": (b"[" * 100_000, "not JSON"),
    "python.jsonl": (b"{'conversations': []}", "not JSON"),
    "table.csv": (b"image,caption\na.png,A thing.\n", "not JSON"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "images").mkdir()
    for name, (make, _) in (FINE_PICTURES | BROKEN_PICTURES).items():
        if name != "plain.avif" or "AVIF" in FORMATS:
            make(folder / "images" / name)
    for name, made in FINE_FILES.items():
        (folder / name).write_bytes(made)
    for name, (made, _) in REFUSED_FILES.items():
        (folder / name).write_bytes(made)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs an entry point in this process: exit code, stdout and the lines about errors."""

    def call(main: Callable, *arguments) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return end.value.code, captured.out, re.findall("^error: .*", captured.err, re.MULTILINE)

    return call


def pictured(names: list[str]) -> list[dict]:
    return [{"kind": name, "image": name, "conversations": ASKED} for name in names]


def names_of(pictures: dict, odd: Path) -> list[str]:
    return [name for name in pictures if (odd / "images" / name).exists()]


def training(odd: Path, rows: Path, out: Path) -> list:
    where = ["--data_path", rows, "--images_path", odd / "images", "--out_dir", out]
    return [*where, *TINY, "--from_weight", "none", "--max_seq_len", 500, "--epochs", 1, "--batch_size", 8]


def scoring(odd: Path, rows: Path, weight: Path) -> list:
    where = ["--data_path", rows, "--images_path", odd / "images", "--weight", weight]
    return [*where, "--score", "--no_blank_baseline", "--batch_size", 16]


def test_training_learns_what_is_fine_and_lists_what_is_not(odd, tmp_path, run):
    good = pictured(names_of(FINE_PICTURES, odd)) + list(FINE_ROWS.values())
    bad = {name: message for name, (_, message) in BROKEN_PICTURES.items()}
    skipped = pictured(list(bad)) + [row for row, _ in SKIPPED_ROWS.values()]
    messages = [*bad.values(), *(message for _, message in SKIPPED_ROWS.values())]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in good + skipped))

    result = run("train_pretrain_vlm.py", *training(odd, rows, tmp_path / "out"))

    assert "Traceback" not in result.stderr
    pictures = (
        len(names_of(FINE_PICTURES, odd)) + len(BROKEN_PICTURES) + 4
    )  # four rows of the tables have some
    assert f"{pictures} of {len(good + skipped)} rows have pictures" in result.stderr
    run_dir = tmp_path / "out/runs/pretrain_vlm_64"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["rows"], summary["skipped_rows"]) == (len(good), len(skipped))
    listed = [json.loads(line)["error"] for line in (run_dir / "bad_samples.jsonl").open(encoding="utf-8")]
    first = len(good) + 1
    assert len(listed) == len(skipped)
    for number, message in enumerate(messages, start=first):
        (error,) = [error for error in listed if error.startswith(f"rows.jsonl:{number}: ")]
        assert message in error and "\n" not in error


def test_scoring_asks_every_row_that_is_fine(odd, weight, tmp_path, call):
    rows = pictured(names_of(FINE_PICTURES, odd))
    rows += [row for row in FINE_ROWS.values() if row.get("conversations")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    code, _, errors = call(eval_vlm.main, *scoring(odd, path, weight), "--report", tmp_path / "r.json")
    assert (code, errors) == (0, [])
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["n"] == len(rows) and report["by_kind"]["0"]["n"] == 1
    assert {question["where"] for question in report["questions"]} == {
        f"rows.jsonl:{number}" for number in range(1, len(rows) + 1)
    }


@pytest.mark.parametrize("name", BROKEN_PICTURES)
def test_scoring_names_a_picture_that_is_broken(name, odd, weight, tmp_path, call):
    path = write_rows(tmp_path / "rows.jsonl", pictured(["plain.png", name]))
    code, _, errors = call(eval_vlm.main, *scoring(odd, path, weight))
    assert code == 1 and len(errors) == 1
    assert f"rows.jsonl:2: cannot read image {odd}/images/{name} (" in errors[0]
    assert BROKEN_PICTURES[name][1] in errors[0]


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_a_row_that_is_refused_ends_training_and_scoring_alike(name, odd, weight, tmp_path, call):
    row, message = REFUSED_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{json.dumps(row)}\n")
    found = call(train_pretrain_vlm.main, *training(odd, path, tmp_path / "out"))
    assert found[0] == 1 and len(found[2]) == 1 and found == call(eval_vlm.main, *scoring(odd, path, weight))
    assert found[2][0].startswith("error: rows.jsonl:2: ") and message in found[2][0]
    assert not list(tmp_path.glob("out/*.pth"))


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_a_file_that_is_refused_ends_training_and_scoring_alike(name, odd, weight, tmp_path, call):
    found = call(train_pretrain_vlm.main, *training(odd, odd / name, tmp_path / "out"))
    assert found[0] == 1 and len(found[2]) == 1
    assert found == call(eval_vlm.main, *scoring(odd, odd / name, weight))
    assert name in found[2][0] and REFUSED_FILES[name][1] in found[2][0]


@pytest.mark.parametrize("name", FINE_FILES)
def test_a_file_is_read_by_its_content(name, odd, weight, tmp_path, call):
    code, _, errors = call(eval_vlm.main, *scoring(odd, odd / name, weight), "--report", tmp_path / "r.json")
    assert (code, errors) == (0, [])
    rows = 2 if name == "struct.parquet" else 3 if FINE_FILES[name].startswith(b"PAR1") else None
    assert json.loads((tmp_path / "r.json").read_text())["n"] == (rows or FINE_FILES[name].count(b"A thing."))


@pytest.mark.parametrize("cached", [False, True], ids=["pictures", "features"])
def test_training_reads_parquet_and_lists_a_picture_that_is_broken(tmp_path, call, cached):
    pictures = [picture_file(), picture_file() if cached else b"", picture_file()]
    (tmp_path / "x.parquet").write_bytes(parquet(**ROWS | {"image_bytes": pictures}))
    cache = ["--cache_features", tmp_path / "features"] if cached else []
    arguments = [*training(tmp_path, tmp_path / "x.parquet", tmp_path / "out"), *cache]
    code, _, errors = call(train_pretrain_vlm.main, *arguments)
    assert code == 0 and not errors
    run_dir = tmp_path / "out/runs/pretrain_vlm_64"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["rows"], summary["skipped_rows"]) == ((3, 0) if cached else (2, 1))
    listed = (run_dir / "bad_samples.jsonl").read_text() if not cached else ""
    assert cached or f"x.parquet[1]: cannot read image of 0 bytes ({NO_PICTURE}" in listed


def test_scoring_names_the_row_of_a_stored_picture_that_is_broken(weight, tmp_path, call):
    made = parquet(**ROWS | {"image_bytes": [picture_file(), b"", picture_file()[:50]]})
    (tmp_path / "x.parquet").write_bytes(made)
    code, _, errors = call(eval_vlm.main, *scoring(tmp_path, tmp_path / "x.parquet", weight))
    assert code == 1 and len(errors) == 1
    assert errors[0].startswith(f"error: x.parquet[1]: cannot read image of 0 bytes ({NO_PICTURE}")


def test_the_chat_takes_the_pictures_that_are_fine(odd, weight, call, monkeypatch):
    fine = names_of(FINE_PICTURES, odd)
    lines = [f"/image '{odd}/images/{name}'\n" for name in [*fine, *BROKEN_PICTURES, "gone.png"]]
    typed = io.TextIOWrapper(io.BytesIO("".join(lines).encode()), "utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    code, out, errors = call(eval_vlm.main, "--weight", weight, "--chat")
    assert code == 0
    assert re.findall(r"^picture (\d+): (.*)", out, re.MULTILINE) == [
        (str(number), name) for number, name in enumerate(fine, start=1)
    ]
    assert len(errors) == len(BROKEN_PICTURES) + 1
    for error, (name, (_, message)) in zip(errors, BROKEN_PICTURES.items(), strict=False):
        assert f"/images/{name} (" in error and message in error


@pytest.fixture(scope="module")
def exported(weight, tmp_path_factory):
    """The processor of an export, by its own code."""
    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_to_hf.py", "--weight", str(weight), "--out", str(folder / "m")])
        with pytest.raises(SystemExit) as end:
            run_main(convert_to_hf.main)
        assert not end.value.code
    return AutoProcessor.from_pretrained(folder / "m", trust_remote_code=True)


@pytest.mark.parametrize("name", FINE_PICTURES)
def test_an_exported_processor_sees_a_picture_as_training_does(name, odd, exported):
    path = odd / "images" / name
    if not path.exists():
        pytest.skip("this Pillow cannot write it")
    settings = exported.image_processor
    with Image.open(path) as opened:
        found = [exported(images=[picture])["pixel_values"][0] for picture in (str(path), opened)]
    colours = [
        (values.permute(1, 2, 0).numpy() * settings.image_std + settings.image_mean) * 255 for values in found
    ]
    assert abs(colours[0] - colours[1]).mean() < 1
    if (expected := FINE_PICTURES[name][1]) is not None:
        assert abs(colours[0].mean((0, 1)) - expected).max() < 4


@pytest.mark.parametrize("name", BROKEN_PICTURES)
def test_an_exported_processor_names_a_picture_that_is_broken(name, odd, exported):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError) as caught:
        exported(images=[str(odd / "images" / name)])
    assert str(caught.value).startswith(f"cannot read image {odd}/images/{name} (")
    assert BROKEN_PICTURES[name][1] in str(caught.value) and "\n" not in str(caught.value)
