"""--fix: a copy of files of rows without those that are bad or like one before; the files stay as they are.

Rows stay as they are, in the file's own format; pictures beside a metadata.jsonl get their whole path.
"""

import codecs
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.cli import UserError
from common.weights import write_file
from dataset.rows import resolve_image
from dataset.sources import PARQUET, PARQUET_ROWS, file_name, find_files
from scripts.checks.reading import Facts

GROUP_ROWS = 1000  # of a row group of Parquet
NAMES = ("file_name", "file_names")


class CleanCopy:
    """Of the files that `data_paths` name, in the folder `out`: `add` every row, then `write`.

    UserError where two of them would have one name there, or `out` has one of them.
    """

    def __init__(self, data_paths: list[str], out: Path, images_root: str):
        self.images_root, self.targets = images_root, {}
        self.digests, self.rows = array("Q"), Counter()  # 0 for a bad row; rows of each file
        for path in map(Path, data_paths):
            for file in find_files(path):
                target = out / (
                    file.relative_to(path) if file != path and file.is_relative_to(path) else file.name
                )
                if target in self.targets.values():
                    raise UserError(f"--fix {out}: two files would be {target}; check one of them at a time")
                self.targets[file] = target
        if taken := {file.resolve() for file in self.targets} & {
            each.resolve() for each in self.targets.values()
        }:
            raise UserError(f"--fix {out}: {min(taken)} is to be checked: expected another folder")

    def add(self, facts: Facts) -> None:
        self.digests.append(0 if facts.error else facts.digest)
        self.rows[facts.file] += 1

    def write(self) -> Iterator[str]:
        """Yields a line about each file."""
        digests = np.asarray(self.digests)
        keep = np.zeros(len(digests), dtype=bool)
        keep[np.unique(digests, return_index=True)[1]] = True
        keep &= digests != 0
        first = 0
        for number, (file, target) in enumerate(self.targets.items()):
            kept = keep[first : (first := first + self.rows[number])]
            if not kept.any():
                yield f"{target}: not written, no row of {file_name(file)} is good"
                continue
            write_file(target, lambda out, file=file, kept=kept: self._copy(file, kept, out))
            yield f"{target}: {kept.sum():,} of {len(kept):,} rows"

    def _copy(self, file: Path, kept: np.ndarray, out: BinaryIO) -> None:
        with file.open("rb") as source:
            if source.read(len(PARQUET)) == PARQUET:
                self._copy_parquet(file, kept, out)
                return
            source.seek(0)
            content = source.read(len(codecs.BOM_UTF8))
            source.seek(len(content) if content == codecs.BOM_UTF8 else 0)
            start = source.tell()
            is_list = next((line for line in source if line.strip()), b"").lstrip().startswith(b"[")
            source.seek(start)
            if is_list:
                rows = [
                    self._row(row, file) for row, good in zip(json.load(source), kept, strict=True) if good
                ]
                out.write(json.dumps(rows, ensure_ascii=False, indent=0).encode())
                return
            for line in itertools.compress((line for line in source if line.strip()), kept):
                if any(name.encode() in line for name in NAMES):
                    line = json.dumps(self._row(json.loads(line), file), ensure_ascii=False).encode()
                out.write(line.strip() + b"\n")

    def _copy_parquet(self, file: Path, kept: np.ndarray, out: BinaryIO) -> None:
        source, first = pq.ParquetFile(file), 0
        with pq.ParquetWriter(out, source.schema_arrow) as writer:
            for batch in source.iter_batches(PARQUET_ROWS):
                part = kept[first : (first := first + batch.num_rows)]
                good = batch.filter(pa.array(part))
                for name in {*NAMES} & {*good.schema.names}:
                    names = [self._absolute(value, file) for value in good.column(name).to_pylist()]
                    place, kind = good.schema.get_field_index(name), good.schema.field(name).type
                    good = good.set_column(place, name, pa.array(names, kind))
                writer.write_batch(good, row_group_size=GROUP_ROWS)
                if first == len(kept):  # the rest of a damaged file cannot be read
                    return

    def _row(self, row: dict, file: Path) -> dict:
        return {key: self._absolute(value, file) if key in NAMES else value for key, value in row.items()}

    def _absolute(self, names: Any, file: Path) -> Any:
        """The names of an imagefolder's pictures, which are below its file's folder."""
        if isinstance(names, list):
            return [self._absolute(name, file) for name in names]
        if names is None or names != names:
            return names
        return str(Path(resolve_image(str(file.parent / str(names)), self.images_root, "")).resolve())
