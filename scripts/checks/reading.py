"""Files of rows -> a verdict on each row and facts about it, by the code that training reads with.

Worker processes judge chunks of rows; memory does not grow with their number. What is counted is figures.py's.
"""

import hashlib
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.distributed import explained, ignore_signals, signals_held
from dataset.errors import DataError
from dataset.pictures import PictureStore, picture_digest, picture_file
from dataset.rows import missing, read_row, resolve_image
from dataset.sources import check_file, raw_rows
from dataset.vlm_dataset import ONLY_TEXT, Sample, SampleMaker
from model.pictures import open_picture
from model.processing_vlm import IGNORE_INDEX, IMAGE_MARKER, MiniMindVLMProcessor

CHUNK_ROWS = 64  # that a worker judges at a time, and of which the pictures in the file are in memory
KNOWN_PICTURES = 50_000  # whose verdict a worker remembers: rows of a picture mostly stand together
ANSWER_CHARACTERS = 200  # longer answers are counted, but not told
SAMPLES, SAMPLES_SEED = 24, 0
NO_PIXELS = torch.empty(0)


class RawRow(NamedTuple):
    """A row as `raw_rows` gives it, and the number of its file."""

    file: int
    where: str
    raw: Any


class Picture(NamedTuple):
    """A picture that can be decoded; `name` is the digest of what the row calls it, `content` of its bytes."""

    name: int
    content: int
    size: tuple[int, int] = (0, 0)  # width and height in pixels; not known where nothing is decoded
    mode: str = ""
    format: str = ""


@dataclass(slots=True)
class Facts:
    """What is known of a row. An `error` makes it bad; a structural one ends training before its first step."""

    file: int
    where: str
    error: str = ""
    is_structural: bool = False
    layout: str = ""
    kind: str = ""
    digest: int = 0  # of all that is learnt from
    pictures: list[Picture] = field(default_factory=list)
    tokens: int = 0  # before the row is cut
    is_cut: bool = False
    supervised: int = 0  # tokens after that
    answers: list[tuple[int, str]] = field(default_factory=list)  # digest, and the text if it is short
    answers_cut: int = 0  # that lose their end
    questions: list[int] = field(default_factory=list)  # digests of what is asked with the pictures shown
    script: str = ""


class RowChecker(SampleMaker):
    """Judges chunks of raw rows; a data set for a DataLoader, whose indices are the chunks themselves.

    Pictures inside files stand in `scratch` while their chunk is judged, a file for each process.
    """

    def __init__(
        self,
        files: list[Path],
        processor: MiniMindVLMProcessor,
        max_length: int,
        images_path: Path | None,
        decode: bool,
        scratch: Path,
    ):
        super().__init__(processor, max_length, str(images_path.resolve()) if images_path else "", "")
        self.files, self.decode, self.scratch = files, decode, scratch
        self.known: dict[str, Picture | str] = {}  # by path or content; of a bad one what is said of it
        self.whole: tuple[list[int], list[int]] = [], []  # token ids and labels of the last row, before a cut
        self.broken: list[str] = []  # what is said of files, or their rests, that could not be read
        self.sampled: list[RawRow] = []  # drawn evenly from all rows
        self.drawn = random.Random(SAMPLES_SEED)
        self.count = 0

    def verdicts(self, num_workers: int, rows: int | None, title: str) -> Iterator[Facts]:
        """Of all rows, in their order; `broken` and `sampled` are whole after the last. `rows` and `title` are
        for the progress bar."""
        workers = {"num_workers": num_workers, "worker_init_fn": ignore_signals}
        loader = DataLoader(self, batch_size=None, sampler=self._chunks(), **workers)
        with tqdm(total=rows, desc=title, unit=" rows", mininterval=0.5, disable=None) as bar, signals_held():
            chunks = iter(loader)
        with tqdm(total=rows, desc=title, unit=" rows", mininterval=0.5) as bar:
            try:
                for facts in chunks:
                    yield from facts
                    bar.update(len(facts))
            except RuntimeError as error:
                raise explained(error) or error from None
