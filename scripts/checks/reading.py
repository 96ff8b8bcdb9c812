"""Files of rows -> a verdict on each row and facts about it, by the code that training reads with.

Worker processes judge chunks of rows; memory does not grow with their number. Counting is figures.py's.
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

CHUNK_ROWS = 64  # that a worker judges at a time, and whose pictures are in memory if they stand in the file
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
    """A picture of a row: digests of what the row calls it and of its bytes. The rest is known where it is
    decoded; `size` is width and height in pixels."""

    name: int
    content: int
    size: tuple[int, int] | None = None
    mode: str = ""
    format: str = ""


@dataclass(slots=True)
class Facts:
    """What is known of a row. An `error` makes it bad; a structural one ends training before it begins."""

    file: int
    where: str
    error: str = ""
    is_structural: bool = False
    layout: str = ""
    digest: int = 0  # of all that is learnt from
    pictures: list[Picture] = field(default_factory=list)
    tokens: int = 0  # before the row is cut
    is_cut: bool = False
    supervised: int = 0  # tokens that are left of it
    answers: list[tuple[int, str]] = field(default_factory=list)  # digest, and the text if it is short
    answers_cut: int = 0  # that lose their end
    questions: list[int] = field(default_factory=list)  # digests of pictures and what is asked
    script: str = ""


class RowChecker(SampleMaker):
    """Judges chunks of raw rows: a data set for a DataLoader, whose indices are the chunks themselves.

    Pictures that stand in files are in `scratch` while their chunk is judged, a file for each process.
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
        self.shown: dict[str, Picture] = {}  # by path, of the row that is judged
        self.whole: tuple[list[int], list[int]] = [], []  # its token ids and labels before it is cut

    def __getitem__(self, chunk: list[RawRow]) -> list[Facts]:
        return [facts if row is None else self.judge(facts, row)[0] for facts, row in self.read(chunk)]

    def read(self, chunk: list[RawRow]) -> list[tuple[Facts, dict | None]]:
        """Rows as rows.py has them, None where the structure is bad; their pictures are in the store."""
        store = self.scratch / str(os.getpid())
        self.places = self.places[0], str(store)
        with store.open("wb") as file:
            pictures = PictureStore(file)
            return [self._structure(raw, pictures) for raw in chunk]

    def _structure(self, given: RawRow, store: PictureStore) -> tuple[Facts, dict | None]:
        facts, root = Facts(given.file, given.where), self.places[0]
        try:
            facts.layout, row = read_row(given.raw, given.where, self.files[given.file].parent, root, store)
            for image in row["images"]:
                if not image.startswith("\0") and (told := missing(image, root)):
                    raise DataError(f"{given.where}: {told}")
            if row["images"] and self.processor.image_processor is None:
                raise DataError(f"{given.where}: {ONLY_TEXT}")
        except DataError as error:
            facts.error, facts.is_structural = str(error), True
            return facts, None
        return facts, row

    def judge(self, facts: Facts, row: dict) -> tuple[Facts, Sample | None]:
        """Adds what the sample of a row tells; None where it cannot be learnt from."""
        self.shown, self.whole = {}, ([], [])
        (sample,) = self.samples_or_errors([row])
        names = [resolve_image(image, *self.places) for image in row["images"]]
        facts.pictures = [self.shown.get(name) or self._undecoded(name) for name in names]
        contents = [picture.content for picture in facts.pictures]
        facts.digest = digest(contents, row["roles"], row["contents"])
        turns = list(zip(row["roles"], row["contents"], strict=False))  # a row of text has no roles
        asked = [text.replace(IMAGE_MARKER, "").strip() for role, text in turns if role == "user"]
        answers = [text.strip() for role, text in turns if role == "assistant"]
        facts.questions = [digest(contents, text) for text in asked]
        facts.answers = [(digest(text), text if len(text) <= ANSWER_CHARACTERS else "") for text in answers]
        facts.script = script_of(row["contents"])
        ids, labels = self.whole
        facts.tokens = len(ids)
        if isinstance(sample, DataError):
            facts.error = str(sample)
            return facts, None
        facts.is_cut = len(sample.input_ids) < len(ids)
        facts.supervised = len(sample.labels) - sample.labels[1:].count(IGNORE_INDEX) - 1
        end, lost = self.processor.tokenizer.eos_token_id, labels[len(sample.input_ids) :]
        facts.answers_cut = lost.count(end) if row["roles"] else 0
        if not sample.supervised:
            facts.error = f"{facts.where}: {self.nothing_learnt}"
        return facts, sample

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        self.whole = super().encode(row)
        return self.whole

    def picture(self, path: str, where: str) -> torch.Tensor:
        """Nothing but the verdict; each picture is decoded once while it is remembered."""
        if not self.decode:
            return NO_PIXELS
        key = picture_digest(path) if "\0" in path else path
        if (known := self.known.get(key)) is None:
            try:
                super().picture(path, where)
                known = self._decoded(path)
            except DataError as error:
                known = str(error).removeprefix(where)
            if len(self.known) == KNOWN_PICTURES:
                del self.known[next(iter(self.known))]
            self.known[key] = known
        if isinstance(known, str):
            raise DataError(f"{where}{known}")
        self.shown[path] = known
        return NO_PIXELS

    def _decoded(self, path: str) -> Picture:
        content = int(picture_digest(path)[:16], 16)
        with open_picture(partial(picture_file, path), path) as image:
            found = image.size, image.mode, image.format or ""
        return Picture(content if "\0" in path else digest(path), content, *found)

    def _undecoded(self, path: str) -> Picture:
        name = int(picture_digest(path)[:16], 16) if "\0" in path else digest(path)
        return Picture(name, name)


class Reading:
    """Of the files that --data_path names: `verdicts` once, after which `broken` and `sampled` are whole."""

    def __init__(self, files: list[Path], processor: MiniMindVLMProcessor, *how: Any):
        """`how` is what else RowChecker takes."""
        self.files, self.checker = files, RowChecker(files, processor, *how)
        self.broken: list[tuple[Path, str]] = []  # files, or rests of them, that could not be read, and why
        self.sampled: list[RawRow] = []  # drawn evenly from all rows
        self.random, self.count = random.Random(SAMPLES_SEED), 0

    def verdicts(self, num_workers: int, title: str) -> Iterator[Facts]:
        """Of every row, in their order; `title` is for the progress bar."""
        workers = {"num_workers": num_workers, "worker_init_fn": ignore_signals}
        with signals_held():
            chunks = iter(DataLoader(self.checker, batch_size=None, sampler=self._chunks(), **workers))
        with tqdm(desc=title, unit=" rows", unit_scale=True, mininterval=0.5) as bar:
            try:
                for facts in chunks:
                    yield from facts
                    bar.update(len(facts))
            except RuntimeError as error:
                if told := explained(error):
                    raise told from None
                raise

    def _chunks(self) -> Iterator[list[RawRow]]:
        for number, file in enumerate(self.files):
            before, chunk = self.count, []
            try:
                check_file(file)
                for where, raw in raw_rows(file):
                    chunk.append(self._drawn(RawRow(number, where, raw)))
                    if len(chunk) == CHUNK_ROWS:
                        yield chunk
                        chunk = []
                if self.count == before:
                    raise DataError(f"{file}: no rows")
            except DataError as error:
                self.broken.append((file, str(error)))
            if chunk:
                yield chunk

    def _drawn(self, row: RawRow) -> RawRow:
        """The row, kept for the page with the same probability as any other."""
        self.count += 1
        if len(self.sampled) < SAMPLES:
            self.sampled.append(row)
        elif (place := self.random.randrange(self.count)) < SAMPLES:
            self.sampled[place] = row
        return row


def digest(*parts: Any) -> int:
    """64 bits of what `parts` say."""
    text = repr(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def script_of(texts: list[str]) -> str:
    """The script that most letters of a row are in, by Unicode's names; kana make its Han Japanese."""
    counts: Counter[str] = Counter()
    for character, count in Counter("".join(texts)).items():
        counts[letter_script(character)] += count
    del counts[""]
    kana = counts.pop("Hiragana", 0) + counts.pop("Katakana", 0)
    if kana:
        counts["Japanese"] = kana + counts.pop("Han", 0)
    return counts.most_common(1)[0][0] if counts else "no letters"


@lru_cache(maxsize=65_536)
def letter_script(character: str) -> str:
    """Latin, Han, Cyrillic, ...; empty for what is no letter."""
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "other").split()[0].capitalize()
    return {"Cjk": "Han", "Fullwidth": "Latin", "Halfwidth": "Katakana"}.get(word, word)
