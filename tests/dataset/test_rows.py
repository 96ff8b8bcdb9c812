"""Data files: what is accepted, and what the message says about a row that is not."""

import json

import pytest
from conftest import write_rows

from dataset.errors import DataError
from dataset.rows import load_rows

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


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"PAR1\xff\xfe\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON"):
        load_rows([tmp_path / "rows.jsonl"])


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl does not exist, expected a JSONL or JSON file"):
        load_rows([tmp_path / "gone.jsonl"])
    with pytest.raises(DataError, match="is a folder, expected a JSONL or JSON file"):
        load_rows([tmp_path])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty.jsonl: no rows"):
        load_rows([tmp_path / "empty.jsonl"])
