"""What --data_path names -> files -> raw rows: JSONL, JSON or Parquet, told apart by content.

What a row means is layouts.py's.
"""

import codecs
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from dataset.errors import DataError
from model.pictures import first_line

log = logging.getLogger(__name__)
NOT_ROWS = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ROW_PATTERNS = "[!.]*.parquet", "[!.]*.jsonl", "[!.]*.json"
FETCHED = "parquet jsonl json jpg jpeg png webp gif bmp tif tiff avif jp2".split()
HUB = re.compile(r"hf:/+datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?(.*)")  # a Path has one slash of two
OTHER_SPLIT = re.compile(r"(?:^|[^a-z])(?:test|validation|valid|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)
PARQUET, HEAD_BYTES = b"PAR1", 4096
PARQUET_ROWS, BUFFER_BYTES = 64, 2**20  # in memory at a time

Rows = Iterator[tuple[str, Any]]


def find_files(path: Path) -> list[Path]:
    """`path` itself, or the files of a folder or of `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`: those
    named metadata.jsonl, else Parquet, else JSONL, else JSON. Files of other splits are left out. DataError
    where the data set cannot be fetched."""
    if on_hub := HUB.fullmatch(str(path)):
        path = _fetch(*on_hub.groups(default=""))
    if not os.path.isdir(path):  # noqa: PTH112 (pathlib's may raise)
        return [path]
    for pattern in ("metadata.jsonl", *ROW_PATTERNS):
        if found := sorted(path.rglob(pattern)):
            other = [file for file in found if OTHER_SPLIT.search(str(file.relative_to(path)))]
            learnt = [file for file in found if file not in other] or found
            if len(learnt) < len(found):
                log.info("%s: files of other splits are left out: %s", path, ", ".join(map(file_name, other)))
            return learnt
    return [path]  # to be told what it is


def _fetch(repository: str, revision: str, folder: str) -> Path:
    """A data set from the hub, in its cache."""
    asked = {"repo_type": "dataset", "revision": revision or None}
    asked["allow_patterns"] = [str(Path(folder, f"*.{suffix}")) for suffix in FETCHED]
    try:
        found = snapshot_download(repository, **asked)
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


def raw_rows(path: Path) -> Rows:
    """`(file:line, row)` of JSON Lines, `(file[index], row)` of a JSON list or of Parquet, with a ValueError
    for a row that cannot be read. DataError where that is so of all that follows."""
    head = _head(path)
    return _parquet_rows(path) if head.startswith(PARQUET) else _json_rows(path, head)


def file_name(path: Path) -> str:
    return path.name.encode(errors="backslashreplace").decode()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _json_rows(path: Path, head: bytes) -> Rows:
    name = file_name(path)
    with path.open("rb") as file:  # a line ends at b"\n" alone; json decodes it
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            if isinstance(rows := _json(file.read()), ValueError):
                raise DataError(f"{name}: {rows}")
            yield from ((f"{name}[{i}]", row) for i, row in enumerate(rows))
            return
        yield from ((f"{name}:{i}", _json(line)) for i, line in enumerate(file, start=1) if line.strip())


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error}), expected a row on each line, or a JSON list of rows")


def _parquet_rows(path: Path) -> Rows:
    """A few rows at a time, as each has its pictures: dictionaries keep them once, memory does not."""
    name, index = file_name(path), 0
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES)
        for group in range(file.num_row_groups):  # or the reader keeps what it needed for the groups before
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group]):
                for row in _python_rows(batch):
                    yield f"{name}[{index}]", row
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _python_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date far away
        if batch.num_rows == 1:
            return [ValueError(first_line(error))]
        return [row for i in range(batch.num_rows) for row in _python_rows(batch.slice(i, 1))]


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{file_name(path)}: Parquet that cannot be read ({first_line(error)})")


def parquet_bytes(path: Path) -> int:
    """The most that the content of a Parquet file takes elsewhere: what it is before compression, with each
    picture once where the writer kept a dictionary. 0 for any other file."""
    if not _head(path).startswith(PARQUET):
        return 0
    try:
        about = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    return sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
