"""Makes files to train on of pictures of your own: of a table, or of a folder for each class.

    python scripts/make_data.py --images_path my_pictures --out_dir my_data [--csv labels.csv]
The table has the columns file, question, answer, or file, caption, or all four. Without --csv each folder in
--images_path is a class. Captions make pretrain.jsonl, questions sft.jsonl; what is held out, near-duplicates
together, goes to pretrain_val.jsonl and sft_val.jsonl. Pictures stay where they are.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run_main, user_errors
from dataset.errors import DataError
from dataset.layouts import our_row
from dataset.pictures import open_image
from dataset.rows import normalise_row
from inference.pictures import PICTURE_SUFFIXES, pictures_in
from model.processing_vlm import IMAGE_MARKER

TABLES = {"file", "caption"}, {"file", "question", "answer"}, {"file", "caption", "question", "answer"}
PROMPTS = "Describe the picture.", "What do you see?"  # what a caption answers
CAPTIONS = "A picture of {}.", "This picture shows {}.", "Here you can see {}."  # of a class
QUESTIONS = "What is this?", "What is in the picture?", "Name what the picture shows."  # its name answers
FILES = {"pretrain.jsonl", "pretrain_val.jsonl", "sft.jsonl", "sft_val.jsonl"}
HASH_SIDE = 8  # a picture's hash has 8 x 8 bits
NEAR_BITS = 3  # near-duplicates' hashes differ in at most so many


class Row(NamedTuple):
    where: str  # file:line of the table, or the picture's name
    stage: str  # pretrain or sft
    image: str  # path below --images_path
    entry: dict  # as training reads it


def main() -> None:
    args = parse_args()
    check_out_dir(args.out_dir)
    rows = list(table_rows(args.csv, args.seed) if args.csv else class_rows(args.images_path, args.seed))
    if not rows:
        raise DataError(f"{args.csv}: no rows")
    pictures: dict[str, str] = {}  # and where each occurs first
    for row in rows:
        pictures.setdefault(row.image, row.where)
    groups = near_groups(picture_hashes(pictures, args.images_path))
    held = held_out(dict(zip(pictures, groups, strict=True)), args.eval_share, args.seed)

    files: dict[str, list[dict]] = {}
    for row in rows:
        side = "_val" if row.image in held else ""
        files.setdefault(f"{row.stage}{side}.jsonl", []).append(row.entry)
    with user_errors(f"--out_dir {args.out_dir}: cannot be written"):
        write_folder(args.out_dir.resolve(), files)
    alike = f"{len(pictures) - len(set(groups))} of them near-duplicates of another"
    print(f"{len(pictures)} pictures, {alike}: {len(pictures) - len(held)} to train on, {len(held)} held out")
    for name, lines in sorted(files.items()):
        print(f"{args.out_dir / name}: {len(lines)} rows")


def parse_args() -> Namespace:
    layout = RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--images_path", type=Path, required=True, help="folder of pictures, or of classes")
    parser.add_argument("--csv", type=Path, help="what is said about them; without it: classes")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write, as a whole")
    parser.add_argument("--eval_share", type=float, default=0.1, help="of the pictures, held out; 0: none")
    parser.add_argument("--seed", type=int, default=1337, help="of the split, and of a class's wording")
    args = parser.parse_args()
    if not 0 <= args.eval_share < 1:
        parser.error(f"--eval_share must be at least 0 and below 1, found {args.eval_share}")
    return args


def check_out_dir(folder: Path) -> None:
    """UserError unless `folder` is new, empty, or has nothing but what an earlier run wrote."""
    with user_errors(f"--out_dir {folder}"):
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if others := [name for name in found if name not in FILES]:
        raise UserError(f"--out_dir {folder} holds other files, {others[0]!r}: name a new or an empty folder")


def table_rows(path: Path, seed: int) -> Iterator[Row]:
    """A caption or a question, or both, of each line."""
    for where, cells in table_cells(path):
        image = cells["file"] and os.path.normpath(cells["file"])
        if "caption" in cells:
            yield checked(where, image, chosen(PROMPTS, seed, image), cells["caption"], "caption")
        if "question" in cells:
            yield checked(where, image, cells["question"], cells["answer"])


def table_cells(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """`file:line` where a row begins, and its cells by their columns' names in small letters. DataError names
    the line that is not as the first one says."""
    with user_errors(f"--csv {path}"):
        content = path.read_bytes()
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: not UTF-8 ({error.reason}), expected CSV in UTF-8") from None
    columns: list[str] = []
    where = f"{path.name}:1"
    try:
        for cells in reader:
            if any(cells) and not columns:
                columns = [cell.strip().lower() for cell in cells]
                if sorted(name for name in columns if name in TABLES[-1]) not in map(sorted, TABLES):
                    expected = "expected the columns file, question and answer, or file and caption"
                    raise DataError(f"{where}: {expected}, found {', '.join(map(repr, cells))}")
            elif any(cells) and len(cells) != len(columns):
                told = "a text with a comma in it needs quotation marks"
                raise DataError(f"{where}: {len(cells)} cells, expected {len(columns)}: {told}")
            elif any(cells):
                yield where, dict(zip(columns, map(str.strip, cells), strict=True))
            where = f"{path.name}:{reader.line_num + 1}"
    except csv.Error as error:
        raise DataError(f"{where}: not CSV ({error})") from None


def class_rows(folder: Path, seed: int) -> Iterator[Row]:
    """A caption and a question of each picture, whose class is the folder in `folder` below which it lies."""
    classes = sorted(folder.glob("[!.]*/"))
    if not classes or (loose := pictures_in(folder)):
        found = repr(loose[0].name) if classes else "none"
        raise DataError(f"--images_path {folder}: expected a folder for each class, or --csv; found {found}")
    for below in classes:
        name = " ".join(below.name.replace("_", " ").split())
        pictures = pictures_below(below)
        if not pictures:
            raise DataError(f"{below}: no picture, expected {', '.join(PICTURE_SUFFIXES)} files")
        for image in (path.relative_to(folder).as_posix() for path in pictures):
            caption = chosen(CAPTIONS, seed, image).format(name)
            yield checked(image, image, chosen(PROMPTS, seed, image), caption, "caption")
            yield checked(image, image, chosen(QUESTIONS, seed, image), name)


def pictures_below(folder: Path) -> list[Path]:
    """Those of any depth, hidden files and folders left out."""
    return sum(map(pictures_below, sorted(folder.glob("[!.]*/"))), pictures_in(folder))


def chosen(texts: tuple[str, ...], seed: int, image: str) -> str:
    """One of `texts`, for this picture always the same."""
    return texts[int(digest(seed, image), 16) % len(texts)]


def digest(seed: int, image: str) -> str:
    return hashlib.sha256(f"{seed}/{image}".encode(errors="surrogateescape")).hexdigest()


def checked(where: str, image: str, question: str, said: str, column: str = "answer") -> Row:
    """A row of two turns. DataError where training would refuse it, or where a text is empty."""
    for name, text in {"file": image, "question": question, column: said}.items():
        if not text:
            raise DataError(f"{where}: {name!r} is empty")
        if IMAGE_MARKER in text and name != "file":
            told = f"{IMAGE_MARKER} is put before each question by itself"
            raise DataError(f"{where}: {name!r} has {IMAGE_MARKER} in it, expected text alone: {told}")
    is_plain = image == image.strip() and "," not in image  # or it would be split there
    asked = {"role": "user", "content": f"{IMAGE_MARKER}\n{question}"}
    turns = [asked, {"role": "assistant", "content": said}]
    entry = {"image": image if is_plain else [image], "conversations": turns}
    normalise_row(our_row(entry, where)[1], where)
    return Row(where, "pretrain" if column == "caption" else "sft", image, entry)


def picture_hashes(pictures: dict[str, str], folder: Path) -> np.ndarray:
    """(N,) uint64. DataError names the first row whose picture is missing or cannot be read."""
    with ThreadPool() as pool:  # Pillow decodes and scales outside the interpreter's lock
        hashes = pool.imap(lambda item: picture_hash(str(folder / item[0]), item[1]), pictures.items())
        bar = tqdm(hashes, "reading pictures", len(pictures), unit=" pictures", leave=False, delay=2)
        return np.fromiter(bar, np.uint64, len(pictures))


def picture_hash(path: str, where: str) -> int:
    """Difference hash (N. Krawetz, "Kind of Like That", 2013): 64 bits, whether each of 8 x 8 grey values is
    less than the one to its right."""
    image = open_image(path, where, image_size=HASH_SIDE).convert("L")
    grey = np.asarray(image.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS))  # (8, 9)
    return int.from_bytes(np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes())


def near_groups(hashes: np.ndarray) -> list[int]:
    """Each hash's group, as a number: within one, steps of at most NEAR_BITS lead from any hash to any other.

    Hashes that differ in k bits agree in one of k + 1 blocks of them: none is missed where those that share a
    block are compared. Time grows with N times the most that share one, memory with N.
    """
    distinct, numbers = np.unique(hashes, return_inverse=True)
    parent = list(range(len(distinct)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for block in np.array_split(np.arange(64, dtype=np.uint64), NEAR_BITS + 1):
        keys = (distinct >> block[0]) & np.uint64(2 ** len(block) - 1)
        order = np.argsort(keys, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for place, number in enumerate(members[:-1].tolist(), start=1):
                others = members[place:]
                bits = np.bitwise_count(distinct[others] ^ distinct[number])
                for other in others[bits <= NEAR_BITS].tolist():
                    parent[root(other)] = root(number)
    return [root(number) for number in numbers.tolist()]


def held_out(groups: dict[str, int], share: float, seed: int) -> set[str]:
    """Pictures of whole groups, `share` of all or a little less. DataError where no group is small enough."""
    members: dict[int, list[str]] = {}
    for image, group in sorted(groups.items()):  # the order of rows must not count
        members.setdefault(group, []).append(image)
    wanted = min(max(round(share * len(groups)), 1), len(groups) - 1) if share else 0
    held: set[str] = set()
    for group in sorted(members.values(), key=lambda group: digest(seed, group[0])):
        if len(held) + len(group) <= wanted:
            held.update(group)
    if share and not held:
        smallest = f"{min(map(len, members.values()))} of {len(groups)} pictures"
        found = f"none can be held out, as the smallest group of near-duplicates has {smallest}"
        raise DataError(f"--eval_share {share}: {found}; 0 holds out none")
    return held


def write_folder(folder: Path, files: dict[str, list[dict]]) -> None:
    """Puts a folder of these JSON Lines in the place of `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary, folder.name)
        whole.mkdir()
        for name, rows in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (whole / name).write_text(text, encoding="utf-8", newline="\n")
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


if __name__ == "__main__":
    run_main(main)
