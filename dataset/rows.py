"""Files of rows -> a checked, memory-mapped table (Arrow), so that memory does not grow with their number.

Here a row is read, brought into one form and checked; tokens and pictures are vlm_dataset.py's.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets.config
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from dataset.errors import DataError
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


def load_rows(paths: list[Path], images_path: Path | None = None) -> Dataset:
    """Reads JSONL or JSON files into a table with FEATURES.

    The table is kept in the `datasets` cache and rebuilt when a file changes. Relative image paths are below
    `images_path`. DataError names file and line of the first row that is not usable.
    """
    stamps = []
    for path in paths:
        if found := _why_no_file(path):
            raise DataError(f"{path} {found}, expected a JSONL or JSON file")
        stamps.append([str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size])
    root = str(images_path.resolve()) if images_path else ""
    try:
        return Dataset.from_generator(
            _read, features=FEATURES, gen_kwargs={"stamps": stamps, "images_root": root}
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            cache = datasets.config.HF_DATASETS_CACHE
            raise DataError(f"cannot write to HF_DATASETS_CACHE {cache}: {error.__cause__}") from None
        raise


def _why_no_file(path: Path) -> str:
    """Empty where there is such a file."""
    try:
        return "" if path.is_file() else "is a folder" if path.is_dir() else "does not exist"
    except OSError as error:  # before Python 3.14: a name that is too long, a folder without permission
        return f"cannot be read ({error.strerror})"


def resolve_image(image: str, images_root: str) -> str:
    return image if Path(image).is_absolute() else str(Path(images_root) / image)


def _read(stamps: list[list], images_root: str) -> Iterator[dict]:
    known: set[str] = set()
    empty = True
    for path, *_ in stamps:
        for where, row in _raw_rows(Path(path)):
            clean = normalise_row(row, where)
            for image in clean["images"]:
                if image not in known:
                    if _why_no_file(Path(resolve_image(image, images_root))):
                        raise DataError(f"{where}: image {image!r} not found below {images_root or '.'!r}")
                    known.add(image)
            empty = False
            yield clean
    if empty:
        raise DataError(f"{', '.join(path for path, *_ in stamps)}: no rows")


def _raw_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """`(file:line, row)` of a JSONL file, or `(file[index], row)` of a JSON file that holds a list."""
    with path.open("rb") as file:  # a line ends at b"\n" alone; json decodes it
        if path.suffix == ".json":
            try:
                rows = json.load(file)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path.name}: not JSON ({error})") from None
            if not isinstance(rows, list):
                raise DataError(f"{path.name}: expected a list of rows, found {type(rows).__name__}")
            yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(rows))
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path.name}:{number}: not JSON ({error})") from None


def normalise_row(row: dict, where: str) -> dict:
    """One row in the form of FEATURES; DataError says what is wrong with it."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    images = row.get("image") or []
    if isinstance(images, str):
        images = [name.strip() for name in images.split(",") if name.strip()]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}: 'image' must be a path or a list of paths, found {images!r}")
    if isinstance(row.get("text"), str) and "conversations" not in row:
        roles, contents = [], [row["text"]]
        if images:
            raise DataError(f"{where}: a 'text' row has no images, found {images!r}")
    else:
        roles, contents = _turns(row, where)
        _check_turns(roles, contents, len(images), where)
    return {
        "where": where,
        "kind": str(row.get("kind") or ""),
        "images": images,
        "roles": roles,
        "contents": contents,
    }


def _turns(row: dict, where: str) -> tuple[list[str], list[str]]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected a non-empty list 'conversations', found {turns!r}")
    roles, contents = [], []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: turn {number} is not an object with 'role' and 'content'")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = LLAVA_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise DataError(
                f"{where}: turn {number}: unknown role {role!r}, expected one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise DataError(f"{where}: turn {number}: 'content' must be text, found {content!r}")
        if content.encode(errors="ignore").decode() != content:
            raise DataError(f"{where}: turn {number}: 'content' has half of a surrogate pair")
        roles.append(role)
        contents.append(content)
    return roles, contents


def _check_turns(roles: list[str], contents: list[str], images: int, where: str) -> None:
    turns = list(zip(roles, contents, strict=True))
    if any(role == "assistant" and not content.strip() for role, content in turns):
        raise DataError(f"{where}: an assistant turn is empty")
    markers = sum(content.count(IMAGE_MARKER) for role, content in turns if role == "user")
    if images and markers != images and (markers or "user" not in roles):
        raise DataError(f"{where}: {markers} {IMAGE_MARKER} markers in the user's turns, but {images} images")
