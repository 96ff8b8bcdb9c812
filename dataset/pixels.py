"""Pictures -> pixels of the encoder's size as bytes, and those -> what the encoder takes, on any device.

Image processors scale and normalise in floats, picture by picture. Bytes are a quarter of what workers send,
and a device does that arithmetic at once. H and W are the encoder's height and width in pixels.
"""

import logging
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

log = logging.getLogger(__name__)
TOLERANCE = 1e-5  # between an image processor's values and ours
KNOWN = {"do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"}
SIZES = (set(), {"shortest_edge"}, {"height", "width"})


class Pixels:
    """Does what `image_processor` does in two halves: resizing and cropping here, arithmetic in `normalised`.
    One that does anything else does all of it itself."""

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor
        given = image_processor.to_dict()
        steps = {name for name, is_done in given.items() if name.startswith("do_") and is_done}
        self.size = dict(given.get("size") or {}) if "do_resize" in steps else {}
        self.crop = dict(given["crop_size"]) if "do_center_crop" in steps else {}
        self.resample = given.get("resample")
        self.scale = given["rescale_factor"] if "do_rescale" in steps else 1.0
        is_normed = "do_normalize" in steps
        self.mean_std = (given["image_mean"], given["image_std"]) if is_normed else (0.0, 1.0)
        self.are_bytes = steps <= KNOWN and self.size.keys() in SIZES
        self.are_bytes = self.are_bytes and all(map(self._is_alike, ((64, 48), (48, 65))))
        if not self.are_bytes:
            name = type(image_processor).__name__
            log.info("%s does more than resize, crop, scale and normalise: it works in floats", name)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(3, H, W) of an RGB picture: uint8 for `normalised`, or what the image processor makes of it."""
        if not self.are_bytes:
            return self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        if shortest := self.size.get("shortest_edge"):
            sides = (int(shortest * side / min(image.size)) for side in image.size)
            image = image.resize(tuple(sides), self.resample)
        elif self.size:
            image = image.resize((self.size["width"], self.size["height"]), self.resample)
        if self.crop:
            width, height = self.crop["width"], self.crop["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where there is no picture
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the image processor makes of pictures whose bytes (N, 3, H, W) are given: fp32."""
        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = self._constants(pixels.device)
        return (pixels.float() * self.scale - mean) / std

    @lru_cache  # noqa: B019
    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, 1, 1) or (1, 1, 1) each; kept, as copying them again would stop a GPU's queue."""
        return tuple(torch.tensor(value, device=device).view(-1, 1, 1) for value in self.mean_std)

    def _is_alike(self, size: tuple[int, int]) -> bool:
        """Whether both halves give what the image processor gives, for a picture of noise."""
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        expected = self.image_processor(image, return_tensors="pt")["pixel_values"]  # (1, 3, H, W)
        found = self.normalised(self(image)[None])
        return found.shape == expected.shape and bool((found - expected).abs().max() < TOLERANCE)
