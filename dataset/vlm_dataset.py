"""Rows -> samples: token ids, labels and preprocessed pictures of one row. Batches are collate.py's.

P placeholder tokens per image, T tokens, N images of the row.
"""

import contextlib
import copy
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dataset.errors import DataError
from dataset.feature_cache import FeatureCache
from dataset.files import sha256_of
from dataset.pictures import MID_GREY, open_image
from dataset.pixels import Pixels
from dataset.rows import load_rows, resolve_image, store_of
from model.model_vlm import MiniMindVLM
from model.pictures import first_line
from model.processing_vlm import IGNORE_INDEX, IMAGE_MARKER, MiniMindVLMProcessor, control_tokens

ONLY_TEXT = "has images, but only text can be trained on here"
TOKENS_AROUND_A_TURN = 6  # two control tokens, the role and the newlines


@dataclass
class Sample:
    """The row `where`, ready for a batch. A row with `images`, their paths or places in the store, has either
    `pixel_values` (N, 3, H, W) as Pixels gives them or, from a feature cache, `image_features` (N, P, W); the
    placeholders of each begin at `image_starts`."""

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    images: list[str] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    where: str = ""

    @property
    def supervised(self) -> bool:
        # A model predicts from the second token on, so the first label never counts.
        return any(label != IGNORE_INDEX for label in self.labels[1:])


class SampleMaker:
    """Rows as rows.py makes them -> samples; rows longer than `max_length` are cut (in text only)."""

    def __init__(self, processor: MiniMindVLMProcessor, max_length: int, images_root: str, store: str):
        self.processor, self.max_length, self.places = processor, max_length, (images_root, store)
        self.features: FeatureCache | None = None  # set it to read features instead of pictures
        self.blank: torch.Tensor | None = None  # (P, W): set it to have these in place of every picture's
        self.pixels = Pixels(processor.image_processor) if processor.image_processor else None
        self.nothing_learnt = f"no supervised token within {max_length} tokens"  # of one not `supervised`

    def samples_or_errors(self, rows: Iterable[dict]) -> list[Sample | DataError]:
        """Of a micro-batch; a picture that several rows show is read once."""
        pictures: dict[str, torch.Tensor] = {}
        found: list[Sample | DataError] = []
        for row in rows:
            try:
                found.append(self._sample(row, pictures))
            except Exception as error:  # a chat template, too, refuses what it does not like
                is_told = isinstance(error, DataError)
                found.append(error if is_told else DataError(f"{row['where']}: {first_line(error)}"))
        return found

    def _sample(self, row: dict, pictures: dict[str, torch.Tensor]) -> Sample:
        (input_ids, labels), tokens = self.encode(row), self.processor.tokens_per_image
        starts = image_starts(input_ids, self.processor.placeholder_id, tokens)
        if len(starts) != (given := len(row["images"])):
            raise DataError(f"{row['where']}: {len(starts)} runs of placeholders, but {given} images")
        input_ids, labels, starts = cut(input_ids, labels, starts, tokens, self.max_length)
        paths = [resolve_image(image, *self.places) for image in row["images"][: len(starts)]]
        sample = Sample(input_ids, labels, images=paths, image_starts=starts, where=row["where"])
        if paths and self.blank is not None:
            sample.image_features = self.blank.expand(len(paths), -1, -1)
        elif paths and self.features is not None:
            sample.image_features = torch.stack([self.features[path] for path in paths])
        elif paths:
            new = [path for path in dict.fromkeys(paths) if path not in pictures]
            pictures |= {path: self.picture(path, row["where"]) for path in new}
            sample.pixel_values = torch.stack([pictures[path] for path in paths])
        return sample

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        if not row["roles"]:
            input_ids = self.processor.encode_text(row["contents"][0])
            return input_ids, list(input_ids)
        turns = zip(row["roles"], row["contents"], strict=True)
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.processor.encode_chat(messages, len(row["images"]))

    def picture(self, path: str, where: str) -> torch.Tensor:
        return self.pixels(open_image(path, where, self.processor.image_size))


class VLMDataset(SampleMaker, Dataset):
    """Conversations with any number of images, or none; `{"text": ...}` rows are trained on whole."""

    def __init__(
        self,
        paths: list[Path],
        processor: MiniMindVLMProcessor,
        max_length: int,
        images_path: Path | None = None,
    ):
        self.rows = load_rows(paths, images_path)
        root = str(images_path.resolve()) if images_path else ""
        super().__init__(processor, max_length, root, store_of(self.rows))
        arguments = {"tokenizer": processor.tokenizer, "system_tokens": _default_system_tokens(processor)}
        arguments |= {"code": sha256_of(Path(__file__))}
        told = {"remove_columns": self.rows.column_names, "desc": "counting tokens"}
        # Kept in the cache of `datasets`, beside the rows.
        self.tokens = self.rows.map(_count_tokens, batched=True, fn_kwargs=arguments, **told)
        columns = self.tokens.data.table
        self.counts = {name: columns.column(name).to_numpy() for name in columns.column_names}  # (rows,) each
        with_images = np.flatnonzero(self.counts["images"])
        if processor.image_processor is None and len(with_images):
            where = self.rows[int(with_images[0])]["where"]
            raise DataError(f"{where}: {ONLY_TEXT}")

    def image_paths(self) -> Iterator[tuple[str, str]]:
        """(path, or store and place; row it stands in) of every image of every row."""
        for row in self.rows.select_columns(["images", "where"]):
            yield from ((resolve_image(image, *self.places), row["where"]) for image in row["images"])

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> np.ndarray:
        """(len(self),) int64: tokens of each row, placeholders included; a few more than it has at most."""
        return np.minimum(self._whole_lengths(), self.max_length)

    def _whole_lengths(self) -> np.ndarray:
        return self.counts["text"] + self.counts["images"] * self.processor.tokens_per_image

    def about(self) -> str:
        """What there is to learn from, in one line; lengths are as `lengths` has them."""
        rows, pictured = len(self), np.count_nonzero(self.counts["images"])
        cut = np.count_nonzero(self._whole_lengths() > self.max_length)
        twice = 1 - len(np.unique(self.counts["digest"])) / rows
        learnt = f"{self.counts['supervised'].mean():.1f} supervised tokens a row"
        return (
            f"{rows:,} rows, {pictured:,} with pictures, up to {cut:,} cut, {learnt}, {twice:.1%} duplicates"
        )

    def split(self, share: float) -> tuple["VLMDataset", "VLMDataset"]:
        """The rows to learn from, and those held out: of a `share` of the pictures, by a hash of each one's
        name, with whatever shows one of theirs; of rows without a picture by a hash of their text. DataError
        where either has none."""
        images = self.rows.data.table.column("images").combine_chunks()
        named, rows = pc.dictionary_encode(images.flatten()), pc.list_parent_indices(images).to_numpy()
        numbers, names = named.indices.to_numpy(), named.dictionary.to_pylist()
        held = (self.counts["digest"] % 2**32 < share * 2**32) & (self.counts["images"] == 0)
        chosen = np.array([zlib.crc32(name.encode()) < share * 2**32 for name in names], dtype=bool)
        while chosen.any() and not held[rows[chosen[numbers]]].all():
            held[rows[chosen[numbers]]] = True
            chosen[numbers[held[rows]]] = True
        parts = [np.flatnonzero(~held), np.flatnonzero(held)]
        if not all(map(len, parts)):
            raise DataError(f"{len(parts[1])} of {len(self)} rows would be held out: give another share")
        return tuple(self._part(part) for part in parts)

    def _part(self, rows: np.ndarray) -> "VLMDataset":
        part = copy.copy(self)
        part.rows, part.counts = self.rows.select(rows), {k: v[rows] for k, v in self.counts.items()}
        return part

    def with_blank(self, model: MiniMindVLM) -> "VLMDataset":
        """The same rows with a mid-grey picture in place of every one."""
        grey = self.processor.pixel_values([Image.new("RGB", (64, 64), MID_GREY)]).to(model.device)
        blank = copy.copy(self)
        blank.blank = model.get_image_embeddings(grey, model.vision_encoder)[0].cpu()
        return blank

    def __getitem__(self, index: int) -> Sample:
        """DataError if the row is not usable."""
        (sample,) = self.samples_or_errors([self.rows[index]])
        if isinstance(sample, DataError):
            raise sample
        return sample


def _count_tokens(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, system_tokens: int, code: str
) -> dict[str, list[int]]:
    """Tokens of each row's text, with those around its turns and images, and about how many of them are
    supervised; its number of images; and a digest of all that it says and shows."""
    control, encode = control_tokens(tokenizer), tokenizer._encode_without_added_tokens
    pieces: list[list[tuple[str, bool]]] = []  # of each row, and whether they are learnt
    text, supervised, digests = [], [], []
    for images, roles, contents in zip(rows["images"], rows["roles"], rows["contents"], strict=True):
        marked = [bool(images) and role == "user" for role in roles or [""]]
        texts = [t.replace(IMAGE_MARKER, "") if m else t for t, m in zip(contents, marked, strict=True)]
        learnt = [role == "assistant" for role in roles] or [True]
        split = zip(map(control.split, texts), learnt, strict=True)
        pieces.append([(piece, is_learnt) for parts, is_learnt in split for piece in parts])
        quoted = sum(len(encode(token)) for text in texts for token in control.findall(text))
        system = system_tokens if roles and roles[0] != "system" else 0
        text.append(quoted + len(texts) * TOKENS_AROUND_A_TURN + len(images) + system)  # a newline each
        supervised.append(2 * sum(learnt))  # what ends a turn, and its newline
        digest = hashlib.blake2b(repr((images, roles, contents)).encode(), digest_size=8).digest()
        digests.append(int.from_bytes(digest, signed=True))
    flat = [piece for row in pieces for piece, _ in row]
    counts = iter([len(ids) for ids in tokenizer(flat, add_special_tokens=False)["input_ids"]])
    for row, parts in enumerate(pieces):
        found = [(next(counts), is_learnt) for _, is_learnt in parts]
        text[row] += sum(count for count, _ in found)
        supervised[row] += sum(count for count, is_learnt in found if is_learnt)
    images = [len(images) for images in rows["images"]]
    return {"text": text, "supervised": supervised, "images": images, "digest": digests}


def _default_system_tokens(processor: MiniMindVLMProcessor) -> int:
    """Tokens of the system turn that a row without one gets."""
    user = {"role": "user", "content": "?"}
    given = processor.encode_prompt([{"role": "system", "content": "?"}, user])
    return len(processor.encode_prompt([user])) - len(given) + 1 + TOKENS_AROUND_A_TURN


def image_starts(input_ids: list[int], placeholder: int, tokens: int) -> list[int]:
    """Where the placeholders of each image begin, so many `tokens`; a shorter run of them is text."""
    starts, position, image = [], 0, [placeholder] * tokens
    with contextlib.suppress(ValueError):  # no more placeholders
        while True:
            position = input_ids.index(placeholder, position)
            is_image = input_ids[position : position + tokens] == image
            starts += [position] * is_image
            position += tokens if is_image else 1
    return starts


def cut(
    input_ids: list[int], labels: list[int], starts: list[int], tokens_per_image: int, max_length: int
) -> tuple[list[int], list[int], list[int]]:
    """Shortens a row to at most `max_length` tokens, never inside an image: an image that does not fit whole
    is dropped with everything after it. `starts` are the images', and returned are those that are left."""
    kept = [start for start in starts if start + tokens_per_image <= max_length]
    end = min([max_length, *starts[len(kept) :]])
    return input_ids[:end], labels[:end], kept
