"""Pictures inside Parquet: kept once, found again, made anew when damaged, and no burden to the memory."""

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_ENCODER, write_rows

import dataset.rows
from common.setup import build_vlm
from dataset.collate import StepDataset
from dataset.errors import DataError
from dataset.feature_cache import FeatureCache, encode_missing
from dataset.rows import load_rows, store_of
from dataset.vlm_dataset import VLMDataset

TURNS = json.dumps(
    [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
)


def write_table(path: Path, pictures: list, row_group_size: int = 50, **options) -> Path:
    """Rows of release 3."""
    table = pa.table(
        {"conversations": [TURNS] * len(pictures), "image_bytes": pa.array(pictures, pa.binary())}
    )
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return path


@pytest.fixture
def contents(data) -> list[bytes]:
    return [(data / f"images/{number}.png").read_bytes() for number in range(8)]


@pytest.fixture
def own_tables(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "tables")
    return tmp_path / "tables/minimind_rows"


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}], ids=["dictionary", "plain"])
def test_a_picture_is_kept_once_however_often_it_is_shown(contents, tmp_path, options):
    path = write_table(tmp_path / "x.parquet", [contents[i % 8] for i in range(200)], **options)
    rows = load_rows([path, write_table(tmp_path / "y.parquet", contents[:2])])
    store = Path(store_of(rows)).read_bytes()
    assert store == b"".join(contents) and len(rows) == 202
    for index, row in ((0, 0), (123, 3), (199, 7), (201, 1)):
        (place,) = rows[index]["images"]
        offset, length = map(int, place.removeprefix("\0").split(":"))
        assert store[offset : offset + length] == contents[row]
    assert rows["where"][123] == "x.parquet[123]" and rows["where"][201] == "y.parquet[1]"


def test_rows_without_a_picture_and_broken_ones_keep_their_places(contents, tmp_path, processor):
    path = write_table(tmp_path / "x.parquet", [contents[0], b"", b"no picture", contents[1]])
    samples = VLMDataset([path], processor, 512)
    good, *bad, last = samples.samples_or_errors(samples.rows)
    assert torch.equal(last.pixel_values[0], samples[3].pixel_values[0]) and good.supervised
    expected = "not a picture, expected PNG"
    assert str(bad[0]).startswith(f"x.parquet[1]: cannot read image of 0 bytes ({expected}")
    assert str(bad[1]).startswith(f"x.parquet[2]: cannot read image of 10 bytes ({expected}")


def test_a_picture_that_several_rows_show_is_decoded_once(contents, tmp_path, processor, monkeypatch):
    opened = []
    real = dataset.vlm_dataset.open_image
    monkeypatch.setattr(dataset.vlm_dataset, "open_image", lambda *a: opened.append(a) or real(*a))
    path = write_table(tmp_path / "x.parquet", [contents[i % 2] for i in range(8)])
    batch = StepDataset(VLMDataset([path], processor, 512), 0)[[list(range(8))]][0]
    assert (
        len(opened) == 2
        and batch["picture_numbers"].tolist() == [0, 1] * 4
        and len(batch["pixel_values"]) == 2
    )


def test_features_of_a_stored_picture_are_those_of_its_file(contents, data, tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, processor = build_vlm(sizes, str(TINY_ENCODER), tokenizer)
    files = [(str(data / f"images/{number}.png"), "x") for number in range(2)]
    cache = FeatureCache(tmp_path / "cache", model, processor)
    encode_missing(cache, model, processor, files)
    cache.check_complete()
    samples = VLMDataset([write_table(tmp_path / "x.parquet", contents[:2] * 3)], processor, 512)
    samples.features = FeatureCache(tmp_path / "cache", model, processor)
    assert not samples.features.find_missing(samples.image_paths())
    assert torch.equal(samples[3].image_features[0], cache[files[1][0]])


def test_a_store_that_is_gone_names_row_and_picture(contents, tmp_path, processor):
    samples = VLMDataset([write_table(tmp_path / "x.parquet", contents)], processor, 512)
    Path(store_of(samples.rows)).unlink()
    with pytest.raises(DataError, match=r"x.parquet\[3\]: cannot read image of \S+ bytes \(.*No such file"):
        samples[3]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_store(contents, tmp_path, processor, context):
    samples = VLMDataset([write_table(tmp_path / "x.parquet", contents)], processor, 512)
    assert len(pickle.dumps(samples)) < 3e6
    loader = torch.utils.data.DataLoader(
        samples, batch_size=None, num_workers=2, multiprocessing_context=context
    )
    for number, sample in enumerate(loader):
        assert torch.equal(sample.pixel_values, samples[number].pixel_values)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(b"")],
    ids=["missing", "cut", "empty"],
)
@pytest.mark.parametrize("name", ["pictures", "rows.arrow", "about.json"])
def test_what_was_damaged_is_made_anew(contents, tmp_path, own_tables, damage, name):
    path = write_table(tmp_path / "x.parquet", contents)
    folder = Path(store_of(load_rows([path]))).parent
    damage(folder / name)
    rows = load_rows([path])
    assert Path(store_of(rows)).read_bytes() == b"".join(contents) and len(rows) == 8
    assert [found.name for found in own_tables.glob("*") if found.is_dir()] == [folder.name]


def killed(paths: list[Path], function: str, call: int) -> None:
    """Dies amid a build: at that call of a function of rows.py."""
    real, calls = getattr(dataset.rows, function), []

    def die(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(dataset.rows, function, die)
    load_rows(paths)


@pytest.mark.parametrize(
    ("function", "call"),
    [("parquet_bytes", 1), ("normalise_row", 1), ("normalise_row", 1500), ("flush_folder", 1)],
    ids=["before the first row", "at the first", "amid the rows", "after the last"],
)
def test_a_build_that_was_killed_leaves_nothing_behind(contents, tmp_path, own_tables, function, call):
    paths = [write_table(tmp_path / f"{name}.parquet", contents * 400) for name in "xy"]
    fork = multiprocessing.get_context("fork")
    for path in paths:  # another build than the one that is killed cleans up as well
        process = fork.Process(target=killed, args=([path], function, call))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    rows = load_rows([paths[1]])
    assert len(rows) == 3200 and Path(store_of(rows)).read_bytes() == b"".join(contents)
    finished = 2 if function == "flush_folder" else 1
    assert len([found for found in own_tables.iterdir() if found.is_dir()]) == finished


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, own_tables, contents):
    path = write_table(tmp_path / "x.parquet", [*contents, None])
    (bad := write_rows(tmp_path / "x.jsonl", [{"conversations": 5}]))
    with pytest.raises(DataError, match=r"x.jsonl:1: expected a non-empty list 'conversations', found 5"):
        load_rows([path, bad])
    assert [found.name for found in own_tables.iterdir()] == [".lock"]


def test_free_space_is_looked_at_first(contents, tmp_path, own_tables, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    monkeypatch.setattr(dataset.rows, "raw_rows", lambda *_: pytest.fail("no row may be read"))
    with pytest.raises(DataError) as caught:
        load_rows([write_table(tmp_path / "x.parquet", contents)])
    place = f"cannot write to HF_DATASETS_CACHE {tmp_path / 'tables'}"
    assert str(caught.value) == f"{place}: rows and pictures of x.parquet need up to 0.0 GB, 0.0 GB are free"


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def watched(path: Path, queue) -> None:
    """Builds a table, and looks at the memory at every thousandth row."""
    real, calls, seen = dataset.rows.normalise_row, [0], []

    def watch(*arguments):
        calls[0] += 1
        if calls[0] % 1000 == 0:
            seen.append(anonymous_bytes())
        return real(*arguments)

    dataset.rows.normalise_row = watch
    load_rows([path])
    queue.put(seen)


@pytest.mark.parametrize("count", [30_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_of_a_build_does_not_grow_with_the_rows(tmp_path, count):
    noise = np.random.default_rng(0).integers(0, 256, (300, 20_000), dtype=np.uint8)
    shown = pa.array(np.arange(count) % 300, pa.int32())
    shown = pa.DictionaryArray.from_arrays(shown, pa.array([picture.tobytes() for picture in noise]))
    table = pa.table({"conversations": [TURNS] * count, "image_bytes": shown})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10_000)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    process = fork.Process(target=watched, args=(tmp_path / "x.parquet", queue))
    process.start()
    seen = queue.get()
    process.join()
    assert len(seen) == count // 1000 and max(seen[11:]) < seen[11] + 30e6
