"""Files of rows -> a checked, memory-mapped table (Arrow), so that memory does not grow with their number.

Here a row is read, brought into one form and checked; tokens and pictures are vlm_dataset.py's.
"""

import codecs
import itertools
import json
import os
import reprlib
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import datasets.config
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from dataset.errors import DataError
from dataset.files import sha256_of
from model.processing_vlm import IMAGE_MARKER, ROLES

FEATURES = Features(
    {
        "where": Value("string"),  # file:line, for messages
        "kind": Value("string"),  # free label of a row, for reports; empty if there is none
        "images": List(Value("string")),
        "roles": List(Value("string")),
        "contents": List(Value("string")),  # a {"text": ...} row is one content without a role
    }
)
LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
PICTURE_KEYS = (  # other names of what 'image' holds, and what cannot be trained on: not to be overlooked
    "image images image_path image_paths image_file image_files image_name image_names image_url image_urls "
    "image_bytes image_base64 image_data img imgs img_path img_paths img_url picture pictures pic pics photo "
    "photos pixel_values media video videos video_path video_url audio audios audio_path audio_url"
).split()
NOT_JSON = {
    b"\x1f\x8b": "gzip",
    b"PK\3\4": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
HEAD_BYTES = 4096
STAT_THREADS, STAT_NAMES = 16, 20_000  # names in memory at a time


def load_rows(paths: list[Path], images_path: Path | None = None) -> Dataset:
    """Reads JSONL or JSON files, told apart by their content, into a table with FEATURES.

    The table is kept in the `datasets` cache and rebuilt when a file or this code changes. Relative image
    paths are below `images_path`. DataError names file and line of the first row that is not usable, or the
    first whose picture is missing: that is looked up at every start.
    """
    key = sha256_of(Path(__file__))
    for path in paths:
        if found := _why_no_rows(path):
            raise DataError(f"{path} {found}, expected a JSONL or JSON file in UTF-8")
        stat = path.stat()
        key += f" {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    root = str(images_path.resolve()) if images_path else ""
    arguments = {"files": [str(path.resolve()) for path in paths], "images_root": root, "key": key}
    try:
        rows = Dataset.from_generator(_read, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            cache = datasets.config.HF_DATASETS_CACHE
            raise DataError(f"cannot write to HF_DATASETS_CACHE {cache}: {error.__cause__}") from None
        raise
    _check_pictures(rows, root)
    return rows


def _why_no_rows(path: Path) -> str:
    """Empty where `path` is a file that may be JSON, by its first bytes."""
    try:
        if not path.is_file():
            return "is a folder" if path.is_dir() else "does not exist"
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    known = [f"is {name}" for start, name in NOT_JSON.items() if head.startswith(start)]
    return [*known, "is binary, or in UTF-16" if b"\0" in head else ""][0]


def resolve_image(image: str, images_root: str) -> str:
    return image if Path(image).is_absolute() else str(Path(images_root) / image)


def _missing(image: str, images_root: str) -> bool:
    return not os.path.isfile(resolve_image(image, images_root))  # noqa: PTH113 (pathlib's may raise)


def _check_pictures(rows: Dataset, images_root: str) -> None:
    """DataError names the first row whose picture is missing. Each picture is looked up once."""
    column = rows.data.table.column("images")
    images = pc.list_flatten(column)
    names, gone = images.unique(), []
    with ThreadPool(STAT_THREADS) as pool:
        for start in tqdm(range(0, len(names), STAT_NAMES), "looking for pictures", leave=False, delay=2):
            part = names.slice(start, STAT_NAMES).to_pylist()
            gone += itertools.compress(part, pool.map(partial(_missing, images_root=images_root), part))
    if gone:
        first = pc.index(pc.is_in(images, pa.array(gone, images.type)), True).as_py()
        where = rows[pc.list_parent_indices(column)[first].as_py()]["where"]
        found = f"image {images[first].as_py()!r} not found below {images_root or '.'!r}"
        raise DataError(f"{where}: {found} ({len(gone)} of {len(names)} pictures are missing)")


def _read(files: list[str], images_root: str, key: str) -> Iterator[dict]:
    """The rows of `files`; `key` is what else decides whether a table that was kept is theirs."""
    empty = True
    for file in files:
        for where, row in _raw_rows(Path(file)):
            empty = False
            yield normalise_row(row, where, images_root)
    if empty:
        raise DataError(f"{', '.join(files)}: no rows")


def _raw_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """`(file:line, row)` of JSON Lines, or `(file[index], row)` of a JSON list."""
    where = name = path.name.encode(errors="backslashreplace").decode()
    with path.open("rb") as file:  # a line ends at b"\n" alone; json decodes it
        head = file.read(HEAD_BYTES)
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


def normalise_row(row: dict, where: str, images_root: str | None = None) -> dict:
    """One row in the form of FEATURES; DataError says what is wrong with it. Whether a name with a comma is
    one picture or several, the files below `images_root` decide, if it is given."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    row = _without_nulls(row)
    images = _images(row, where, images_root)
    if "text" in row and "conversations" not in row:
        roles, contents = [], [row["text"]]
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f"{where}: 'text' must be text that is not blank, found {row['text']!r}")
        if images:
            raise DataError(f"{where}: a 'text' row has no images, found {images!r}")
    else:
        roles, contents = _turns(row, len(images), where)
    kind = str(row.get("kind", ""))
    for field, values in {"image": images, "kind": [kind], "content": contents}.items():
        for value in values:
            if value.encode(errors="ignore").decode() != value:
                raise DataError(f"{where}: {field!r} has half of a surrogate pair: {reprlib.repr(value)}")
    return {"where": where, "kind": kind, "images": images, "roles": roles, "contents": contents}


def _without_nulls(entry: dict) -> dict:
    """Columns that some rows lack are filled with null or NaN by what writes tables."""
    return {key: value for key, value in entry.items() if value is not None and value == value}


def _images(row: dict, where: str, images_root: str | None) -> list[str]:
    images = row.get("image") or row.get("images")
    if not images:
        _refuse_pictures(row, where)
        return []
    if (row.get("images") or images) != images:
        raise DataError(f"{where}: has both 'image' and 'images', and they differ")
    if isinstance(images, str):
        whole, images = images.strip(), [name.strip() for name in images.split(",") if name.strip()]
        if len(images) > 1 and images_root is not None:
            if not _missing(whole, images_root):
                return [whole]
            if gone := [name for name in images if _missing(name, images_root)]:
                found = f"image {gone[0]!r} not found below {images_root or '.'!r}: {whole!r} was split at"
                raise DataError(f"{where}: {found} the comma, as there is no file of the whole name")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}: 'image' must be a path or a list of paths, found {images!r}")
    return images


def _refuse_pictures(entry: dict, where: str) -> None:
    for key, value in entry.items():
        if value and key.lower() in PICTURE_KEYS:
            found = f"{key!r}: {reprlib.repr(value)}"
            raise DataError(f"{where}: pictures are expected in the row's 'image', as paths; found {found}")


def _turns(row: dict, images: int, where: str) -> tuple[list[str], list[str]]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected a non-empty list 'conversations', found {turns!r}")
    roles, contents = [], []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: turn {number} is not an object with 'role' and 'content'")
        turn = _without_nulls(turn)
        _refuse_pictures(turn, f"{where}: turn {number}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = LLAVA_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise DataError(
                f"{where}: turn {number}: unknown role {role!r}, expected one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise DataError(f"{where}: turn {number}: 'content' must be text, found {content!r}")
        roles.append(role)
        contents.append(content)
    if any(role == "assistant" and not text.strip() for role, text in zip(roles, contents, strict=True)):
        raise DataError(f"{where}: an assistant turn is empty")
    asked = [text for role, text in zip(roles, contents, strict=True) if role == "user"]
    markers = sum(text.count(IMAGE_MARKER) for text in asked)
    if images and markers != images and (markers or not asked):
        raise DataError(f"{where}: {markers} {IMAGE_MARKER} markers in the user's turns, but {images} images")
    return roles, contents
