"""Rows as people publish them -> rows of our form, a function for each layout; rows.py checks what they hold.

A picture is a path, a data: URL or, where it stands in the file, `bytes`.
"""

import base64
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.errors import DataError
from model.processing_vlm import IMAGE_MARKER

FILE_NAMES, TURNS = {"file_name", "file_names"}, {"conversations", "messages", "texts"}
LLAVA_ROLES = {"human": "user", "gpt": "assistant"}


def our_row(row: Any, where: str, folder: Path = Path()) -> tuple[str, dict]:
    """The layout's name, and the row in our form: `image` or `images`, `conversations` (a list of `role` and
    `content`) or `text`, and what no layout knows. An imagefolder's names are below `folder`. DataError where
    no layout fits, or where the turns or a part of them are not what their layout has."""
    if not isinstance(row, dict):  # a ValueError says why
        found = row if isinstance(row, ValueError) else f"expected an object, found {type(row).__name__}"
        raise DataError(f"{where}: {found}")
    row = without_nulls(row)
    try:
        for key in row.keys() & {"image", "images", "image_bytes"}:
            row[key] = _picture(row[key])
        for key in row.keys() & TURNS:
            row[key] = _turns(row[key], key)
        for key in row.keys() & FILE_NAMES:
            row[key] = [str(folder / str(name)) for name in _listed(row[key])]
        return _convert(row)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _convert(row: dict) -> tuple[str, dict]:
    """By the first layout that fits the row."""
    if row.keys() & FILE_NAMES and not (row.get("image") or row.get("images")):
        return "imagefolder", _imagefolder(row)
    if "conversations" in row and bytes in map(type, _listed(row.get("image_bytes"))):
        return "release 3", _release_3(row)
    if "conversations" in row:
        is_llava = any("from" in turn for turn in row["conversations"])
        return "LLaVA" if is_llava else "conversations", _conversations(row)
    if "messages" in row:
        return "messages", _messages(row)
    if "texts" in row:
        return "the_cauldron", _the_cauldron(row)
    if "text" in row:
        return "text", row
    found = f"no layout has the fields {', '.join(map(repr, row)) or '(none)'}"
    raise ValueError(f"expected a non-empty list 'conversations', found None: {found}")


def _imagefolder(row: dict) -> dict:
    """Pictures beside `metadata.jsonl`, with turns of another layout or a caption in `text`."""
    names = row.pop("file_name", []) + row.pop("file_names", [])
    if "text" in row and not row.keys() & TURNS:
        asked = {"role": "user", "content": IMAGE_MARKER * len(names)}
        row["conversations"] = [asked, {"role": "assistant", "content": row.pop("text")}]
    return _convert({**row, "image": names})[1]


def _release_3(row: dict) -> dict:
    """A row of text alone has a picture too, a tiny black one: without a marker there is none."""
    pictures, row = _listed(row.pop("image_bytes")), _conversations(row)
    asked = [str(turn["content"]) for turn in row["conversations"] if turn["role"] == "user"]
    return {**row, "image": pictures if any(IMAGE_MARKER in text for text in asked) else []}


def _conversations(row: dict) -> dict:
    """Ours, and LLaVA's: `from` and `value`, `human` and `gpt`."""
    for turn in row["conversations"]:
        role = turn.get("role", turn.get("from"))
        role = LLAVA_ROLES.get(role, role) if isinstance(role, str) else role
        turn |= {"role": role, "content": turn.get("content", turn.get("value"))}
    return row


def _messages(row: dict) -> dict:
    """OpenAI's: a turn's parts bring pictures, or stand for the row's, in their order."""
    given, shown, turns = row.pop("image", None) or row.pop("images", None) or [], [], row.pop("messages")
    rest = iter(_listed(given))
    for number, turn in enumerate(turns, start=1):
        if isinstance(parts := turn.get("content"), list):
            pictures = [_part_picture(part, rest, f"turn {number}") for part in parts]
            said = zip(parts, pictures, strict=True)
            turn["content"] = "\n".join(part["text"] if own is None else IMAGE_MARKER for part, own in said)
            shown += (own := [picture for picture in pictures if picture is not None])
            if own and turn.get("role") != "user":
                raise ValueError(f"turn {number}: pictures are expected in the user's turns")
    return {**row, "image": [*shown, *rest] if shown else given, "conversations": turns}


def _part_picture(part: Any, rest: Iterator, where: str) -> Any:
    """The picture of a part of a message; None of a text."""
    part = without_nulls(part) if isinstance(part, dict) else {"type": type(part).__name__}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return None
    if part.get("type") not in ("image", "image_url"):
        expected = f"{where}: expected a part 'text', 'image' or 'image_url'"
        raise ValueError(f"{expected}, found {reprlib.repr(part)}")
    own = next((part[key] for key in ("image_url", "image", "url", "path") if key in part), None)
    own = _picture(own["url"] if isinstance(own, dict) and "url" in own else own)
    if own is None and (own := next(rest, None)) is None:
        raise ValueError(f"{where}: an image part more than the row has pictures")
    return own


def _the_cauldron(row: dict) -> dict:
    """And FineVision's: pairs of `user` and `assistant`."""
    pairs, roles = row.pop("texts"), ("user", "assistant")
    turns = [{**pair, "role": role, "content": pair.get(role)} for pair in pairs for role in roles]
    return {**row, "conversations": turns}


def _turns(found: Any, column: str) -> list[dict]:
    """A list of objects, or JSON of one."""
    expected, given = f"expected a non-empty list {column!r}, found", found  # shortened where it is told
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{expected} {reprlib.repr(given)}, not JSON ({error})") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{expected} {reprlib.repr(given)}")
    for number, turn in enumerate(found, start=1):
        if not isinstance(turn, dict):
            parts = "'user' and 'assistant'" if column == "texts" else "'role' and 'content'"
            raise ValueError(f"turn {number} is not an object with {parts}")
    return [without_nulls(turn) for turn in found]


def _picture(found: Any) -> Any:
    """Of the Image columns of `datasets`, {"bytes", "path"}: the bytes if there are any, else the path. Of a
    data: URL its bytes."""
    if isinstance(found, str) and found.startswith("data:"):
        try:
            return base64.b64decode(found.partition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"cannot read image {reprlib.repr(found)} ({error})") from None
    if isinstance(found, list):
        return [_picture(one) for one in found]
    if isinstance(found, dict) and found and found.keys() <= {"bytes", "path"}:
        stored = found.get("bytes")
        return stored if isinstance(stored, bytes) else found if stored is not None else found.get("path")
    return found


def without_nulls(entry: dict) -> dict:
    """Columns that some rows lack are filled with null or NaN by what writes tables."""
    return {key: value for key, value in entry.items() if value is not None and value == value}


def _listed(found: Any) -> list:
    return found if isinstance(found, list) else [found]
