"""What --data_path names -> files -> raw rows: JSONL, JSON or Parquet, told apart by content.

What a row means is layouts.py's.
"""

import codecs
import contextlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from dataset.errors import DataError
from dataset.picture_store import PictureStore
from model.pictures import first_line

log = logging.getLogger(__name__)
NOT_ROWS = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ROW_FILES = "[!.]*.parquet", "[!.]*.jsonl", "[!.]*.json"
FETCHED = "parquet jsonl json jpg jpeg png webp gif bmp tif tiff avif jp2".split()
HUB = re.compile(r"hf:/+datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?(.*)")  # a Path has one slash of two
OTHER_SPLIT = re.compile(r"(?:^|[^a-z])(?:test|validation|valid|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)
PARQUET, HEAD_BYTES = b"PAR1", 4096
ROWS = 1000  # of Parquet that are Python objects at a time
SMALL_GROUP_BYTES = 2**28  # of its pictures: such a row group's dictionary may be in memory

Rows = Iterator[tuple[str, Any]]


def find_files(path: Path) -> list[Path]:
    """`path` itself, or the files of a folder or of `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`: those
    named metadata.jsonl, else Parquet, else JSONL, else JSON. Files of other splits are left out.

    DataError where the data set cannot be fetched.
    """
    if on_hub := HUB.fullmatch(str(path)):
        path = _fetch(*on_hub.groups(default=""))
    if not path.is_dir():
        return [path]
    for pattern in ("metadata.jsonl", *ROW_FILES):
        if found := sorted(path.rglob(pattern)):
            other = [file for file in found if OTHER_SPLIT.search(str(file.relative_to(path)))]
            learnt = [file for file in found if file not in other] or found
            if len(learnt) < len(found):
                names = ", ".join(map(file_name, other))
                log.info("%s: files of other splits are left out: %s", path, names)
            return learnt
    return [path]  # to be told what it is


def _fetch(repository: str, revision: str, folder: str) -> Path:
    """A data set from the hub, in its cache."""
    asked = {"repo_type": "dataset", "revision": revision or None}
    try:
        found = snapshot_download(repository, **asked, allow_patterns=[f"{folder}*.{s}" for s in FETCHED])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"hf://datasets/{repository} cannot be fetched ({reason})") from None
    log.info("hf://datasets/%s: revision %s", repository, Path(found).name)
    return Path(found, folder)


def check_file(path: Path) -> None:
    """DataError where by its first bytes `path` is no file of rows."""
    found = ""
    try:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
        elif not (head := _head(path)).startswith(PARQUET):
            known = [f"is {name}" for start, name in NOT_ROWS.items() if head.startswith(start)]
            found = [*known, "is binary, or in UTF-16" if b"\0" in head else ""][0]
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    if found:
        raise DataError(f"{path} {found}, expected a JSONL or JSON file in UTF-8, or Parquet")


def raw_rows(path: Path, store: PictureStore) -> Rows:
    """`(file:line, row)` of JSON Lines, `(file[index], row)` of a JSON list or of Parquet, whose pictures go
    to `store`."""
    return _parquet_rows(path, store) if _head(path).startswith(PARQUET) else _json_rows(path)


def file_name(path: Path) -> str:
    return path.name.encode(errors="backslashreplace").decode()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _json_rows(path: Path) -> Rows:
    where = name = file_name(path)
    head = _head(path)
    with path.open("rb") as file:  # a line ends at b"\n" alone; json decodes it
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        try:
            if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from ((f"{name}[{i}]", row) for i, row in enumerate(json.load(file)))
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{name}:{number}"
                    yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            expected = "expected a row on each line, or a JSON list of rows"
            raise DataError(f"{where}: not JSON ({error}), {expected}") from None


def _parquet_rows(path: Path, store: PictureStore) -> Rows:
    name, index = file_name(path), 0
    for batch in _batches(path):
        columns = [store.without_pictures(column) for column in batch.columns]
        table = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
        for start in range(0, len(table), ROWS):
            try:
                rows = table.slice(start, ROWS).to_pylist()
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date far away
                raise DataError(
                    f"{name}: among the {ROWS} rows from [{index}]: {first_line(error)}"
                ) from None
            for row in rows:
                yield f"{name}[{index}]", row
                index += 1


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Of one row group each. A group's dictionary keeps each picture once, but is copied into each batch."""
    leaves, groups = picture_columns(path)
    small = max(groups, default=0) <= SMALL_GROUP_BYTES
    with _parquet_errors(path):
        file = pq.ParquetFile(path, read_dictionary=leaves if small else [])
        for group in range(file.num_row_groups):
            yield from file.iter_batches(32 * ROWS if small else ROWS, row_groups=[group])


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file_name(path)}: Parquet that cannot be read ({first_line(error)})") from None


def picture_columns(path: Path) -> tuple[list[str], list[int]]:
    """The columns that hold bytes, and how many these are in each row group: of the distinct ones, as long as
    the writer kept a dictionary."""
    with _parquet_errors(path):
        file = pq.ParquetFile(path)
    leaves = [file.schema.column(i) for i in range(len(file.schema))]
    binary = [leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE" for leaf in leaves]
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    picked = list(itertools.compress(range(len(leaves)), binary))
    sizes = [sum(group.column(i).total_uncompressed_size for i in picked) for group in groups]
    return [leaves[i].path for i in picked], sizes


def picture_bytes(files: list[Path]) -> int:
    """The most that the pictures inside `files` can take."""
    return sum(sum(picture_columns(path)[1]) for path in files if _head(path).startswith(PARQUET))
