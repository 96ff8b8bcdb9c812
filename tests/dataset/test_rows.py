"""Data files: what is accepted, and what the message says about a row that is not."""

import gzip
import json
import os
import tracemalloc
import zipfile

import pytest
from conftest import write_rows

import dataset.rows
from dataset.errors import DataError
from dataset.rows import load_rows
from dataset.sources import raw_rows

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
PICTURE_TURNS = [{"role": "user", "content": "What?\n<image>"}, TURNS[1]]


def test_rows_of_all_forms_become_one_form(data):
    llava = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"image": "0.png, 1.png", "conversations": TURNS},
        {"image": ["0.png"], "conversations": llava, "kind": "what"},
        {"conversations": TURNS},
        {"text": "Only text."},
    ]
    jsonl = write_rows(data / "mixed.jsonl", rows)
    (data / "list.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    table = load_rows([jsonl, data / "list.json"], data / "images")
    assert table["images"][:] == [["0.png", "1.png"], ["0.png"], [], [], ["0.png", "1.png"]]
    assert table["roles"][:2] == [["user", "assistant"]] * 2
    assert table["contents"][1] == ["<image>\nWhat?", "A cat."] and table["kind"][1] == "what"
    assert table["roles"][3] == [] and table["contents"][3] == ["Only text."]
    assert table["where"][1] == "mixed.jsonl:2" and table["where"][4] == "list.json[0]"


def test_a_marker_in_a_row_without_pictures_is_text(tmp_path):
    table = load_rows([write_rows(tmp_path / "rows.jsonl", [{"conversations": PICTURE_TURNS}])])
    assert table["contents"][0][0] == "What?\n<image>" and table["images"][0] == []


def test_a_changed_file_is_read_again(data):
    path = write_rows(data / "rows.jsonl", [{"text": "one"}])
    assert len(load_rows([path])) == 1
    write_rows(path, [{"text": "one"}, {"text": "two"}])
    assert load_rows([path])["contents"][:] == [["one"], ["two"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"rows.jsonl:2: not JSON"),
        ("[1, 2]", r"rows.jsonl:2: expected an object, found list"),
        ('{"image": "0.png"}', r"rows.jsonl:2: expected a non-empty list 'conversations', found None"),
        (json.dumps({"conversations": [{"role": "bot", "content": "x"}]}), "turn 1: unknown role 'bot'"),
        (json.dumps({"conversations": [{"role": "user", "content": 3}]}), "turn 1: 'content' must be text"),
        (json.dumps({"conversations": [*TURNS[:1], {"role": "assistant", "content": " "}]}), "turn is empty"),
        (
            json.dumps({"image": ["0.png", "1.png"], "conversations": PICTURE_TURNS}),
            "1 <image> markers .* 2 images",
        ),
        (
            json.dumps({"image": "gone.png", "conversations": TURNS}),
            r"image 'gone.png' not found below '.*images'",
        ),
        (
            json.dumps({"conversations": [{"role": ["user"], "content": "x"}]}),
            r"turn 1: unknown role \['user'\]",
        ),
        ('{"conversations": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
        ("[" * 100_000, "rows.jsonl:2: not JSON"),
        (json.dumps({"image": "0.png", "text": "x"}), "a 'text' row has no images, found"),
        (
            json.dumps({"image": 7, "conversations": TURNS}),
            "'image' must be a path or a list of paths, found 7",
        ),
    ],
)
def test_bad_row_is_named(data, line, message):
    path = data / "rows.jsonl"
    path.write_text(json.dumps({"conversations": TURNS}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_rows([path], data / "images")
    assert "rows.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"image_path": "0.png"}, "'image_path': '0.png'"),
        ({"image": None, "img": ["0.png"]}, "'img': ['0.png']"),
        ({"image": "", "image_url": "http://x/0.png"}, "'image_url': 'http://x/0.png'"),
        ({"Image": "0.png"}, "'Image': '0.png'"),
        ({"image_bytes": "x" * 9999}, "'image_bytes': 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
        ({"video": "a.mp4"}, "'video': 'a.mp4'"),
        ({"audio": {"path": "a.wav"}}, "'audio': {'path': 'a.wav'}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("rest", [{"conversations": TURNS}, {"text": "x"}], ids=["conversation", "text"])
def test_pictures_under_another_name_are_not_overlooked(data, row, found, rest):
    path = write_rows(data / "rows.jsonl", [{**row, **rest}])
    with pytest.raises(DataError) as caught:
        load_rows([path], data / "images")
    message = f"rows.jsonl:1: pictures are expected in the row's 'image', as paths; found {found}"
    assert str(caught.value) == message


def test_a_picture_inside_a_turn_is_not_overlooked(data):
    path = write_rows(data / "rows.jsonl", [{"conversations": [{**TURNS[0], "image": "0.png"}, TURNS[1]]}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: turn 1: pictures are expected .* found 'image'"):
        load_rows([path], data / "images")


def test_images_is_read_like_image(data):
    images = ["0.png, 1.png", ["2.png"], None, []]
    path = write_rows(data / "rows.jsonl", [{"images": value, "conversations": TURNS} for value in images])
    assert load_rows([path], data / "images")["images"][:] == [["0.png", "1.png"], ["2.png"], [], []]
    write_rows(path, [{"image": "0.png", "images": ["1.png"], "conversations": TURNS}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: has both 'image' and 'images', and they differ"):
        load_rows([path], data / "images")


@pytest.mark.parametrize(
    "extra",
    [
        {"image_id": 7, "num_images": 2, "width": 640, "imageid": "x"},
        {"video": None, "audio": [], "img": "", "image_url": float("nan")},
        {"image": "0.png", "image_path": "/elsewhere/0.png"},
    ],
    ids=["ids and sizes", "empty", "beside an image"],
)
def test_keys_that_hide_no_picture_are_ignored(data, extra):
    path = write_rows(data / "rows.jsonl", [{**extra, "conversations": TURNS}])
    assert load_rows([path], data / "images")["images"][:] == [["0.png"] if "image" in extra else []]


NAN = float("nan")


@pytest.mark.parametrize("null", [None, NAN], ids=["null", "NaN"])
def test_null_is_absence(tmp_path, null):
    turns = [
        {"from": role, "value": text, "role": null, "content": null, "image": null}
        for role, text in (("human", "What?"), ("gpt", "A cat."))
    ]
    empty = {"image": null, "images": null, "kind": null}
    rows = [{"text": "x", "conversations": null, **empty}, {"conversations": turns, "text": null, **empty}]
    table = load_rows([write_rows(tmp_path / "rows.jsonl", rows)])
    assert table["contents"][:] == [["x"], ["What?", "A cat."]]
    assert table["roles"][:] == [[], ["user", "assistant"]]
    assert table["kind"][:] == ["", ""] and table["images"][:] == [[], []]


@pytest.mark.parametrize(
    ("kind", "expected"), [(0, "0"), (False, "False"), ("", ""), (1.5, "1.5"), ("where", "where")]
)
def test_kinds_are_labels(tmp_path, kind, expected):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x", "kind": kind}])
    assert load_rows([path])["kind"][0] == expected


@pytest.mark.parametrize("text", ["", " \n", 5, ["x"]], ids=repr)
def test_a_text_that_says_nothing_is_refused(tmp_path, text):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": text}])
    with pytest.raises(DataError) as caught:
        load_rows([path])
    assert str(caught.value) == f"rows.jsonl:2: 'text' must be text that is not blank, found {text!r}"


LINES = b'{"text": "one"}\n\n{"text": "two"}\n'
LIST = b'[{"text": "one"},\n {"text": "two"}]\n'
BINARY = "is binary, or in UTF-16"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.JSON", "rows.txt"])
@pytest.mark.parametrize(
    ("content", "where"),
    [
        pytest.param(LINES, ":3", id="lines"),
        pytest.param(b"\xef\xbb\xbf" + LINES, ":3", id="lines with a BOM"),
        pytest.param(b"\xef\xbb\xbf\n" + LINES, ":4", id="a BOM and a blank line"),
        pytest.param(LINES.replace(b"\n", b"\r\n"), ":3", id="CRLF"),
        pytest.param(LIST, "[1]", id="list"),
        pytest.param(b"\xef\xbb\xbf \n" + LIST, "[1]", id="list with a BOM"),
        pytest.param(LIST.replace(b"\n", b""), "[1]", id="list on a line"),
    ],
)
def test_content_decides_what_a_file_is(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    table = load_rows([tmp_path / name])
    assert table["contents"][:] == [["one"], ["two"]] and table["where"][1] == name + where


def zipped(content: bytes, path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "found"),
    [
        pytest.param(lambda path: gzip.compress(LINES), "is gzip", id="gzip"),
        pytest.param(lambda path: zipped(LINES, path), "is zip", id="zip"),
        pytest.param(lambda path: LINES.decode().encode("utf-16"), "is UTF-16", id="UTF-16"),
        pytest.param(lambda path: LINES.decode().encode("utf-16-le"), BINARY, id="UTF-16 without BOM"),
        pytest.param(lambda path: LIST.decode().encode("utf-16-be"), BINARY, id="a list in UTF-16"),
        pytest.param(lambda path: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", BINARY, id="a picture"),
    ],
)
def test_a_file_that_is_no_json_is_named(tmp_path, make, found):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(make(path))
    with pytest.raises(DataError) as caught:
        load_rows([path])
    assert str(caught.value) == f"{path} {found}, expected a JSONL or JSON file in UTF-8, or Parquet"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "text": "one"\n}\n', "rows.json:1: not JSON (Expecting property name"),
        (b'[{"text": "one"}', "rows.json: not JSON (Expecting ',' delimiter"),
        (b'{"text": "one"}\n{"text": "\xff"}\n', "rows.json:2: not JSON ('utf-8' codec can't decode"),
    ],
    ids=["one object over lines", "a list without an end", "not UTF-8"],
)
def test_what_was_expected_is_said_of_broken_json(tmp_path, content, message):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows([tmp_path / "rows.json"])
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("expected a row on each line, or a JSON list of rows")


def test_lines_are_read_as_a_stream(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x" * 1000}] * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in raw_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 1e6 < path.stat().st_size


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": "a \ud83d"}, "content"),
        ({"text": "a", "kind": "\udcff"}, "kind"),
        ({"image": "\udcff.png", "conversations": TURNS}, "image"),
        ({"image": ["0.png", "\udcff.png"], "conversations": TURNS}, "image"),
        ({"conversations": [{"role": "user", "content": "\ud83d"}]}, "content"),
    ],
    ids=["text", "kind", "image", "images", "turn"],
)
def test_half_a_surrogate_pair_is_named_wherever_it_stands(data, row, field):
    (data / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=f"rows.jsonl:2: '{field}' has half of a surrogate pair"):
        load_rows([data / "rows.jsonl"], data / "images")


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"r\xff.jsonl")
    table = load_rows([write_rows(path, [{"text": "x"}])])
    assert table["where"][0] == "r\\udcff.jsonl:1"


def test_a_name_with_a_comma_is_one_picture_if_there_is_such_a_file(data):
    (data / "images/0.png").rename(data / "images/Smith, J.png")
    rows = [{"image": name, "conversations": TURNS} for name in (" Smith, J.png", "1.png,2.png")]
    table = load_rows([write_rows(data / "rows.jsonl", rows)], data / "images")
    assert table["images"][:] == [["Smith, J.png"], ["1.png", "2.png"]]


def test_that_a_name_was_split_is_said_and_the_file_may_come_later(data):
    path = write_rows(data / "rows.jsonl", [{"image": "Smith, J.png", "conversations": TURNS}])
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: image 'Smith' .*: 'Smith, J.png' was split at the comma"
    ):
        load_rows([path], data / "images")
    (data / "images/0.png").rename(data / "images/Smith, J.png")
    assert load_rows([path], data / "images")["images"][0] == ["Smith, J.png"]


def test_a_file_replaced_with_its_times_and_size_kept_is_read_again(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "one"}])
    before = path.stat()
    assert load_rows([path])["contents"][:] == [["one"]]
    write_rows(path, [{"text": "two"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert load_rows([path])["contents"][:] == [["two"]]


def test_newer_code_reads_anew_and_the_same_code_does_not(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "one"}])
    tables = [load_rows([path]).cache_files for _ in range(2)]
    newer = tmp_path / "rows.py"
    newer.write_text("# another version")
    monkeypatch.setattr(dataset.rows, "__file__", str(newer))
    tables.append(load_rows([path]).cache_files)
    assert tables[0] == tables[1] != tables[2]


def test_pictures_are_looked_for_at_every_start(data):
    rows = [{"image": f"{i % 8}.png", "conversations": TURNS} for i in range(3000)]
    path = write_rows(data / "rows.jsonl", rows)
    assert len(load_rows([path], data / "images")) == 3000
    for name in ("5.png", "7.png"):
        (data / "images" / name).unlink()
    with pytest.raises(DataError) as caught:
        load_rows([path], data / "images")
    assert str(caught.value) == (
        f"rows.jsonl:6: image '5.png' not found below '{data}/images' (2 of 8 pictures are missing)"
    )


def test_each_picture_is_looked_up_once(data, monkeypatch):
    looked_up = []
    missing = dataset.rows.missing
    monkeypatch.setattr(
        dataset.rows, "missing", lambda name, **root: looked_up.append(name) or missing(name, **root)
    )
    load_rows([data / "captions.jsonl", data / "dialogues.jsonl"], data / "images")
    assert sorted(looked_up) == [f"{i}.png" for i in range(8)]


@pytest.mark.parametrize("row", [2, 1500, 2999])
def test_the_first_row_of_a_missing_picture_is_named_in_a_long_table(data, row):
    rows = [{"image": ["0.png", "1.png"], "conversations": TURNS}, {"conversations": TURNS}] * 1500
    rows[row] = {"image": "gone.png", "conversations": TURNS}
    path = write_rows(data / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"rows.jsonl:{row + 1}: image 'gone.png' .*1 of 3 pictures"):
        load_rows([path], data / "images")


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl does not exist, expected a JSONL or JSON file"):
        load_rows([tmp_path / "gone.jsonl"])
    with pytest.raises(DataError, match="is a folder, expected a JSONL or JSON file"):
        load_rows([tmp_path])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty.jsonl: no rows"):
        load_rows([tmp_path / "empty.jsonl"])
