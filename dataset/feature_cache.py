"""Outputs of the frozen encoder on disk, so that each picture is encoded once, whatever epochs and stages.

A folder for each encoder and precision holds shards: `{name}.npy`, features (images, P, W) in fp16, or in
int8 with one fp16 scale per token, beside `{name}.json`, the SHA-256 of their image files. The JSON is
written last: a shard without one does not count. P tokens per image, W the encoder's width.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.errors import DataError
from dataset.files import write_atomically
from dataset.pictures import PIXELS_VERSION, open_image, picture_digest, picture_name
from dataset.pixels import Pixels
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

SHARD_IMAGES = 1024  # a multiple of the next
BATCH_IMAGES = 64
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "architectures"}  # decide no feature

Item = tuple[str, str]  # path of a picture, or store and place, and the row it stands in, for messages


class FeatureCache:
    """Features by path, memory-mapped, in `folder`'s own folder for this encoder: its weights, config and
    preprocessing are part of the key, and so is `dtype`, "float16" or "int8". A picture is known by its
    content: a changed file is a new picture."""

    def __init__(
        self, folder: Path, model: MiniMindVLM, processor: MiniMindVLMProcessor, dtype: str = "float16"
    ):
        encoder, config = model.vision_encoder, model.vision_encoder.config.to_dict()
        fixed = {name: config[name] for name in config.keys() - VOLATILE} | {"dtype": str(encoder.dtype)}
        settings = [PIXELS_VERSION, processor.image_processor.to_dict(), fixed]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        key.update(b"" if dtype == "float16" else dtype.encode())
        for name, tensor in sorted(encoder.state_dict().items()):
            key.update(name.encode())
            key.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.folder, self.dtype = folder / key.hexdigest()[:16], dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: dict[str, np.ndarray | None] = {}  # opened when asked for
        self.places: dict[str, tuple[str, int]] = {}  # digest of an image file -> shard and row
        self.digests: dict[str, str] = {}  # path -> digest

    def __getitem__(self, path: str) -> Tensor:
        """(P, W) fp16 of a picture that `find_missing` has been asked about."""
        shard, row = self.places[self.digests[path]]
        if self.shards[shard] is None:
            self.shards[shard] = np.load(self.folder / f"{shard}.npy", mmap_mode="r")
        stored = self.shards[shard][row]
        if stored.dtype.names:  # int8 with scales
            stored = (stored["values"] * stored["scales"][:, None].astype(np.float32)).astype(np.float16)
        return torch.from_numpy(stored.copy())

    def __getstate__(self) -> dict:
        """For worker processes that are not forked: pickling a memory map would copy all of it."""
        return {**self.__dict__, "shards": dict.fromkeys(self.shards)}

    def read_shards(self) -> None:
        """Takes note of the shards that are complete, other processes' included."""
        for listing in self.folder.glob("[!.]*.json"):
            if listing.stem not in self.shards and listing.with_suffix(".npy").is_file():
                self.shards[listing.stem] = None
                for row, digest in enumerate(json.loads(listing.read_text())):
                    self.places[digest] = listing.stem, row

    def find_missing(self, items: Iterable[Item]) -> dict[str, Item]:
        """The pictures without features, by digest. DataError for a file that cannot be read."""
        self.read_shards()
        missing: dict[str, Item] = {}
        for path, where in items:
            if path not in self.digests:
                try:
                    self.digests[path] = digest = picture_digest(path)
                except OSError as error:
                    found = f"{picture_name(path)} ({error.strerror})"
                    raise DataError(f"{where}: cannot read image {found}") from None
                if digest not in self.places:
                    missing[digest] = path, where
        return missing

    def write_shard(self, digests: list[str], features: np.ndarray) -> None:
        name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        write_atomically(self.folder / f"{name}.npy", lambda file: np.save(file, features))
        write_atomically(self.folder / f"{name}.json", lambda file: file.write(json.dumps(digests).encode()))

    def check_complete(self) -> None:
        """OSError if a picture that was asked about has no features: another rank wrote them elsewhere."""
        self.read_shards()
        if lacking := sum(digest not in self.places for digest in self.digests.values()):
            raise OSError(f"{self.folder} lacks {lacking} pictures: all ranks must share --cache_features")


def encode_missing(
    cache: FeatureCache,
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    items: Iterable[Item],
    rank: int = 0,
    world_size: int = 1,
    **workers: Any,
) -> None:
    """Encodes this rank's share of the pictures that `cache` lacks; `check_complete` once all ranks are
    through. `workers` are a DataLoader's settings. DataError for a picture that cannot be read, OSError where
    the disk is too small."""
    missing = list(cache.find_missing(items).items())
    width = model.config.vision_config.hidden_size
    token_bytes = width + 2 if cache.dtype == "int8" else width * 2
    needed = len(missing) * len(model.config.image_ids) * model.config.pixel_shuffle**2 * token_bytes
    if needed > (free := shutil.disk_usage(cache.folder).free):
        found = f"need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise OSError(f"{cache.folder}: features of {len(missing)} pictures {found}")
    # By digest, not by place in the list: another rank may already have shortened that.
    share = [entry for entry in missing if int(entry[0], 16) % world_size == rank]
    pixels = Pixels(processor.image_processor)
    opened = partial(_opened, pixels=pixels, image_size=processor.image_size)
    batches = DataLoader(share, BATCH_IMAGES, collate_fn=opened, **workers)
    digests, features = [digest for digest, _ in share], []
    with tqdm(total=len(share), desc="encoding pictures", unit="image", disable=rank > 0 or not share) as bar:
        for number, pictures in enumerate(batches, start=1):
            if isinstance(pictures, DataError):
                raise pictures
            pixel_values = pixels.normalised(pictures.to(model.device))  # (images, 3, H, W)
            encoded = model.get_image_embeddings(pixel_values, model.vision_encoder)
            features.append(_to_stored(encoded.cpu(), cache.dtype))
            bar.update(len(pictures))
            if len(features) == SHARD_IMAGES // BATCH_IMAGES or number == len(batches):
                cache.write_shard(digests[:SHARD_IMAGES], np.concatenate(features))
                digests, features = digests[SHARD_IMAGES:], []


def _opened(entries: list[tuple[str, Item]], pixels: Pixels, image_size: int | None) -> Tensor | DataError:
    """Pictures (images, 3, H, W). A DataError is not raised: a worker process would bury it."""
    try:
        return torch.stack([pixels(open_image(*item, image_size)) for _, item in entries])
    except DataError as error:
        return error


def _to_stored(features: Tensor, dtype: str) -> np.ndarray:
    """Features (images, P, W) as they lie on disk: (images, P, W) fp16, or (images,) records of "values"
    (P, W) int8 and "scales" (P,) fp16, the token's largest absolute value / 127."""
    if dtype == "float16":
        return features.to(torch.float16).numpy()
    features = features.float().numpy()
    smallest = np.finfo(np.float16).tiny  # a token of zeros has a scale as well
    scales = np.maximum(np.abs(features).max(-1) / 127, smallest).astype(np.float16)  # (images, P)
    record = np.dtype([("values", np.int8, features.shape[1:]), ("scales", np.float16, scales.shape[1:])])
    stored = np.empty(len(features), record)
    values = np.rint(features / scales[..., None].astype(np.float32))
    stored["values"], stored["scales"] = np.clip(values, -127, 127), scales
    return stored
