"""Files of rows -> a checked, memory-mapped table (Arrow), so that memory does not grow with their number.

Here a row is read, brought into one form and checked; tokens and pictures are vlm_dataset.py's.
"""

import hashlib
import itertools
import json
import logging
import os
import reprlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from filelock import FileLock
from tqdm import tqdm

from dataset.errors import DataError
from dataset.files import flush_folder, sha256_of
from dataset.layouts import our_row
from dataset.pictures import PictureStore
from dataset.sources import check_file, file_name, find_files, parquet_bytes, raw_rows
from model.processing_vlm import IMAGE_MARKER, ROLES

log = logging.getLogger(__name__)
FEATURES = Features(
    where=Value("string"),  # file:line or file[index], for messages
    kind=Value("string"),  # free label of a row, for reports; empty if there is none
    images=List(Value("string")),  # paths, or places in the store of pictures
    roles=List(Value("string")),
    contents=List(Value("string")),  # a {"text": ...} row is one content without a role
)
PICTURE_KEYS = (  # other names of what 'image' holds, and what cannot be trained on: not to be overlooked
    "image images image_path image_paths image_file image_files image_name image_names image_url image_urls "
    "image_bytes image_base64 image_data img imgs img_path img_paths img_url picture pictures pic pics photo "
    "photos pixel_values media video videos video_path video_url audio audios audio_path audio_url"
).split()
CODE = "rows", "sources", "layouts", "pictures"  # what decides how a file is read
ROWS = 1000  # that are written at a time
STAT_THREADS, STAT_NAMES = 16, 20_000  # names in memory at a time
TABLE, STORE, ABOUT = "rows.arrow", "pictures", "about.json"  # in a folder that is there whole or not at all


def load_rows(paths: list[Path], images_path: Path | None = None) -> Dataset:
    """Reads files of rows, folders of them, or data sets of the hub into a table with FEATURES, and the
    pictures inside them into a store beside it. Both are kept in the cache of `datasets`, and made anew when
    a file or this code changes. Relative image paths are below `images_path`. DataError names file and line
    of the first row that is not usable, or the first whose picture is missing: that is looked up at every
    start."""
    key = [sha256_of(Path(sys.modules[f"dataset.{name}"].__file__)) for name in CODE]
    files = [file for path in paths for file in find_files(path)]
    for path in files:
        check_file(path)
        stat = path.stat()
        key += [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    root = str(images_path.resolve()) if images_path else ""
    cache = datasets.config.HF_DATASETS_CACHE / "minimind_rows"
    folder = cache / hashlib.sha256(json.dumps([*key, root]).encode()).hexdigest()[:32]
    try:
        if (lines := _lines_about(folder)) is None:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / ".lock"):  # one build at a time in the whole cache
                lines = _lines_about(folder) or _build(folder, files, root)
    except OSError as error:
        raise DataError(f"cannot write to HF_DATASETS_CACHE {cache.parent}: {error}") from None
    for line in lines:
        log.info("%s", line)
    rows = Dataset.from_file(str(folder / TABLE))
    _check_pictures(rows, root)
    return rows


def _lines_about(folder: Path) -> list[str] | None:
    """What the log says about a table; None unless table and store have the sizes they were written with."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in about["sizes"].items())
    except (OSError, ValueError):
        return None
    return about["log"] if whole else None


def _build(folder: Path, files: list[Path], images_root: str) -> list[str]:
    """Writes table and store, and returns what the log says about them."""
    building = folder.with_name(".building")
    for left in (building, folder):  # half built by a process that was killed, and damaged
        shutil.rmtree(left, ignore_errors=True)
    building.mkdir()
    try:
        if (needed := sum(map(parquet_bytes, files))) > (free := shutil.disk_usage(building).free):
            found = f"need up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise OSError(f"rows and pictures of {', '.join(map(file_name, files))} {found}")
        lines: list[str] = []
        with (building / STORE).open("wb") as pictures, (building / TABLE).open("wb") as table:
            rows = _read(files, images_root, PictureStore(pictures), lines)
            rows = iter(tqdm(rows, f"reading {files[0].name}", unit=" rows", leave=False, delay=2))
            with pa.ipc.new_stream(table, FEATURES.arrow_schema) as writer:
                while part := list(itertools.islice(rows, ROWS)):
                    writer.write(pa.RecordBatch.from_pylist(part, FEATURES.arrow_schema))
            sizes = {TABLE: table.tell(), STORE: pictures.tell()}
            for file in (pictures, table):
                file.flush()
                os.fsync(file.fileno())
        (building / ABOUT).write_text(json.dumps({"sizes": sizes, "log": lines}))
        building.rename(folder)
        flush_folder(folder.parent)
        return lines
    except BaseException:  # Ctrl-C too
        shutil.rmtree(building, ignore_errors=True)
        raise


def resolve_image(image: str, images_root: str, store: str) -> str:
    """An entry of `images` as what opens it: a path, or the `store_of` the rows and a place in it."""
    return store + image if image.startswith("\0") else str(Path(images_root, image))


def store_of(rows: Dataset) -> str:
    """The path of the store that a table of `load_rows` names pictures in."""
    return str(Path(rows.cache_files[0]["filename"]).with_name(STORE)) if rows.cache_files else ""


def missing(image: str, images_root: str) -> str:
    """What is said of a picture where no file is; empty where one is."""
    is_there = os.path.isfile(resolve_image(image, images_root, ""))  # noqa: PTH113 (pathlib's may raise)
    return "" if is_there else f"image {image!r} not found below {images_root or '.'!r}"


def _check_pictures(rows: Dataset, images_root: str) -> None:
    """DataError names the first row whose picture is missing. Each picture is looked up once."""
    column = rows.data.table.column("images")
    images = pc.list_flatten(column)
    names, gone = images.unique(), {}
    with ThreadPool(STAT_THREADS) as pool:
        for start in tqdm(range(0, len(names), STAT_NAMES), "looking for pictures", leave=False, delay=2):
            part = [name for name in names.slice(start, STAT_NAMES).to_pylist() if not name.startswith("\0")]
            told = pool.map(partial(missing, images_root=images_root), part)
            gone |= {name: message for name, message in zip(part, told, strict=True) if message}
    if gone:
        first = pc.index(pc.is_in(images, pa.array([*gone], images.type)), True).as_py()
        where = rows[pc.list_parent_indices(column)[first].as_py()]["where"]
        found = gone[images[first].as_py()]
        raise DataError(f"{where}: {found} ({len(gone)} of {len(names)} pictures are missing)")


def _read(files: list[Path], images_root: str, store: PictureStore, lines: list[str]) -> Iterator[dict]:
    """The rows of `files`; says in `lines` what each file has."""
    for file in files:
        counts: Counter[tuple[str, bool]] = Counter()  # of layouts, with and without pictures
        for where, raw in raw_rows(file):
            layout, row = read_row(raw, where, file.parent, images_root, store)
            counts[layout, bool(row["images"])] += 1
            yield row
        if not counts:
            raise DataError(f"{file}: no rows")
        layouts = ", ".join(dict.fromkeys(layout for layout, _ in counts))
        pictured = sum(count for (_, has_pictures), count in counts.items() if has_pictures)
        what = f"{file_name(file)}: layout {layouts}: {pictured} of {counts.total()} rows have pictures"
        unmarked = counts["release 3", False]
        lines.append(f"{what}; in {unmarked} no <image> asks for it" if unmarked else what)


def read_row(raw: Any, where: str, folder: Path, root: str, store: PictureStore) -> tuple[str, dict]:
    """The layout's name, and a row of a file in `folder` as FEATURES has it; DataError says what is wrong."""
    layout, row = our_row(raw, where, folder)
    row = normalise_row(row, where, root)
    row["images"] = [store.add(image) if isinstance(image, bytes) else image for image in row["images"]]
    return layout, row


def normalise_row(row: dict, where: str, images_root: str | None = None) -> dict:
    """A row of our form as FEATURES has it, but for pictures that stand in the file; DataError says what is
    wrong with it. The files below `images_root`, if given, decide whether a name with a comma is one picture
    or several."""
    images = _images(row, where, images_root)
    if "text" in row and "conversations" not in row:
        roles, contents = [], [row["text"]]
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f"{where}: 'text' must be text that is not blank, found {row['text']!r}")
        if images:
            raise DataError(f"{where}: a 'text' row has no images, found {reprlib.repr(images)}")
    else:
        turns = row["conversations"]
        _check_turns(turns, len(images), where)
        roles, contents = [turn["role"] for turn in turns], [turn["content"] for turn in turns]
    kind = str(row.get("kind", ""))
    names = [image for image in images if isinstance(image, str)]
    for field, values in {"image": names, "kind": [kind], "content": contents}.items():
        for value in values:
            if value.encode(errors="ignore").decode() != value:
                raise DataError(f"{where}: {field!r} has half of a surrogate pair: {reprlib.repr(value)}")
    return {"where": where, "kind": kind, "images": images, "roles": roles, "contents": contents}


def _images(row: dict, where: str, images_root: str | None) -> list[str | bytes]:
    images = row.get("image") or row.get("images")
    if not images:
        _refuse_pictures(row, where)
        return []
    if (row.get("images") or images) != images:
        raise DataError(f"{where}: has both 'image' and 'images', and they differ")
    if isinstance(images, bytes):
        images = [images]
    if isinstance(images, str):
        whole, images = images.strip(), [name.strip() for name in images.split(",") if name.strip()]
        if len(images) > 1 and images_root is not None:
            if not missing(whole, images_root):
                return [whole]
            if gone := next(filter(None, (missing(name, images_root) for name in images)), None):
                split = f"{whole!r} was split at the comma, as there is no file of the whole name"
                raise DataError(f"{where}: {gone}: {split}")
    if not isinstance(images, list) or not all(isinstance(image, str | bytes) for image in images):
        raise DataError(f"{where}: 'image' must be a path or a list of paths, found {reprlib.repr(images)}")
    for name in (image for image in images if isinstance(image, str)):
        if "\0" in name:  # it would be taken for a place in the store
            raise DataError(f"{where}: no path can have a NUL character: {reprlib.repr(images)}")
        if name.startswith(("http://", "https://")):
            raise DataError(f"{where}: no picture is fetched from the network, expected a path: {name!r}")
    return images


def _refuse_pictures(entry: dict, where: str) -> None:
    for key, value in entry.items():
        if value and key.lower() in PICTURE_KEYS:
            found = f"{key!r}: {reprlib.repr(value)}"
            raise DataError(f"{where}: pictures are expected in the row's 'image', as paths; found {found}")


def _check_turns(turns: list[dict], images: int, where: str) -> None:
    for number, turn in enumerate(turns, start=1):
        _refuse_pictures(turn, f"{where}: turn {number}")
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}"
            raise DataError(f"{where}: turn {number}: unknown role {role!r}, {expected}")
        if not isinstance(content, str):
            raise DataError(f"{where}: turn {number}: 'content' must be text, found {content!r}")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        raise DataError(f"{where}: an assistant turn is empty")
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    markers = sum(text.count(IMAGE_MARKER) for text in asked)
    if images and markers != images and (markers or not asked):
        raise DataError(f"{where}: {markers} {IMAGE_MARKER} markers in the user's turns, but {images} images")
