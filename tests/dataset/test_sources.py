"""What --data_path may name besides a file: a folder, an imagefolder, a data set of the hub."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, write_rows
from hub_stub import COMMIT, HubStub

from dataset.errors import DataError
from dataset.rows import load_rows
from dataset.sources import raw_rows


def made(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.parquet", "b.jsonl"], ["a.parquet[0]"]),
        (["data/train-1.parquet", "data/train-0.parquet"], ["train-0.parquet[0]", "train-1.parquet[0]"]),
        (["b.jsonl", "info.json"], ["b.jsonl:1"]),
        (["b.json", ".hidden.json", "notes.txt"], ["b.json:1"]),
        (["x/metadata.jsonl", "a.parquet"], ["metadata.jsonl:1"]),
        (["test-0.parquet"], ["test-0.parquet[0]"]),
        (["train.jsonl", "latest.jsonl"], ["latest.jsonl:1", "train.jsonl:1"]),
    ],
    ids=[
        "Parquet first",
        "below",
        "JSONL before JSON",
        "others",
        "imagefolder",
        "one split",
        "parts of words",
    ],
)
def test_a_folder_stands_for_its_files(tmp_path, files, expected):
    for name in files:
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.write_bytes(made("x") if name.endswith(".parquet") else b'{"text": "x"}\n')
    assert load_rows([tmp_path])["where"][:] == expected


def test_other_splits_of_a_folder_are_left_out_and_named(tmp_path, caplog):
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(made(name))
    with caplog.at_level(logging.INFO):
        assert load_rows([tmp_path])["contents"][:] == [["train-00000-of-00001"]]
    left = "test-00000-of-00001.parquet, validation-00000-of-00001.parquet"
    assert f"{tmp_path}: files of other splits are left out: {left}" in caplog.messages


def test_captions_of_an_imagefolder_answer_a_turn_of_the_picture(data):
    write_rows(data / "images/metadata.jsonl", [{"file_name": "3.png", "text": "A tree."}])
    row = load_rows([data / "images"])[0]
    assert row["images"] == [str(data / "images/3.png")]
    assert (row["roles"], row["contents"]) == (["user", "assistant"], ["<image>", "A tree."])


def test_a_picture_of_an_imagefolder_that_is_missing_is_named(data):
    write_rows(data / "images/metadata.jsonl", [{"file_name": "gone.png", "text": "A tree."}])
    with pytest.raises(DataError, match=r"metadata.jsonl:1: image '.*gone.png' not found"):
        load_rows([data / "images"])


READ = """
import sys, logging
from pathlib import Path
from dataset.errors import DataError
from dataset.rows import load_rows
from dataset.sources import raw_rows
logging.basicConfig(level=logging.INFO, format="%(message)s")
for name in sys.argv[1:]:
    try:
        print(load_rows([Path(name)])["where"][:])
    except DataError as error:
        print("error:", error)
"""


def read(*names: str, hub: HubStub, home: Path, **env: str) -> tuple[list[str], str]:
    """What a process of its own reads of each, a line each, and its log."""
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    env = os.environ | own | {"HF_DATASETS_CACHE": str(home / "tables")} | env
    command = [sys.executable, "-c", READ, *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_data_set_of_the_hub_is_fetched_once_and_read(tmp_path):
    files = {
        "data/train-0.parquet": made("x"),
        "other/a.parquet": made("y"),
        "README.md": b"",
        "big.zip": b"PK",
    }
    name = "hf://datasets/owner/name/data"
    with HubStub(datasets={"owner/name": files}) as hub:
        found, log = read(name, name, hub=hub, home=tmp_path)
        assert found == ["['train-0.parquet[0]']"] * 2
        assert f"hf://datasets/owner/name: revision {COMMIT}" in log
        assert hub.fetched() == ["train-0.parquet"]
        assert read(name, hub=hub, home=tmp_path, HF_HUB_OFFLINE="1")[0] == found[:1]


def test_data_sets_that_cannot_be_had_are_named(tmp_path):
    files = {"owner/gated": {"a.parquet": made("x")}, "owner/name": {}}
    names = [f"hf://datasets/owner/{name}" for name in ("none", "gated", "name/data")]
    with HubStub(datasets=files, gated={"owner/gated"}) as hub:
        none, gated, empty = read(*names, hub=hub, home=tmp_path)[0]
    assert none.startswith("error: hf://datasets/owner/none cannot be fetched (")
    assert gated.startswith("error: hf://datasets/owner/gated cannot be fetched (")
    assert empty.startswith("error: ")


def test_rows_after_one_that_is_not_json_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "cut\n\n{"text": "b"}\n')
    (where, first), (bad, error), last = raw_rows(tmp_path / "rows.jsonl")
    assert (where, first, bad, last) == (
        "rows.jsonl:1",
        {"text": "a"},
        "rows.jsonl:2",
        ("rows.jsonl:4", {"text": "b"}),
    )
    assert isinstance(error, ValueError) and str(error).startswith("not JSON (")


def test_text_that_is_not_utf_8_spoils_its_own_row_of_parquet_alone(tmp_path):
    column = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    rows = dict(raw_rows(tmp_path / "x.parquet"))
    assert (rows["x.parquet[0]"], rows["x.parquet[2]"]) == ({"text": "a"}, {"text": "c"})
    with pytest.raises(DataError, match=r"^x.parquet\[1\]: 'utf-8' codec can't decode byte 0xff"):
        load_rows([tmp_path / "x.parquet"])
