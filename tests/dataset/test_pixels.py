"""Pictures as bytes, normalised later, are what the image processor makes of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from dataset.pixels import Pixels

PROCESSORS = {
    "CLIP": CLIPImageProcessorPil(),
    "CLIP that pads": CLIPImageProcessorPil(size={"shortest_edge": 200}),
    "SigLIP": SiglipImageProcessorPil(),
    "SigLIP2 of one size": SiglipImageProcessorPil(size={"height": 256, "width": 256}, resample=2),
    "ViT": ViTImageProcessorPil(),
    "DINOv2": BitImageProcessorPil(size={"shortest_edge": 256}),
    "neither scaled nor normalised": ViTImageProcessorPil(do_rescale=False, do_normalize=False),
}
SIZES = [(256, 256), (640, 480), (333, 500), (50, 1000), (31, 17), (224, 224)]


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_bytes_become_the_pixel_values_of_the_image_processor(name, size):
    pixels, image = Pixels(PROCESSORS[name]), noise(*size)
    expected = PROCESSORS[name](image, return_tensors="pt")["pixel_values"]
    found = pixels(image)
    assert pixels.are_bytes and found.dtype == torch.uint8
    assert torch.allclose(pixels.normalised(found[None]), expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "processor",
    [
        Siglip2ImageProcessorPil(),
        CLIPImageProcessorPil(size={"shortest_edge": 224, "longest_edge": 300}, do_center_crop=False),
        CLIPImageProcessorPil(do_pad=True, pad_size={"height": 230, "width": 230}),
    ],
    ids=["patches", "a longest side", "padding"],
)
def test_a_processor_of_other_steps_works_in_floats_and_is_named(processor, caplog):
    with caplog.at_level("INFO"):
        pixels = Pixels(processor)
    assert type(processor).__name__ in caplog.text and not pixels.are_bytes
    expected = processor(noise(60, 40), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels.normalised(pixels(noise(60, 40))), expected)
