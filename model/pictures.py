"""Files, arrays, PIL pictures -> upright RGB pictures with 8 bits a channel; where all pictures are opened.

H and W are a picture's height and width in pixels; `image_size` is what preprocessing scales its shorter side
to: a picture that is far too large shrinks by a whole factor first.
"""

import base64
import contextlib
import io
import os
import struct
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import to_numpy_array

# Only these: Pillow goes by content, and would hand a PostScript file of any name to Ghostscript.
Image.init()
FORMATS = [name for name in "PNG JPEG WEBP GIF BMP TIFF AVIF JPEG2000".split() if name in Image.OPEN]
OVERSAMPLING = 4  # times the encoder's size: what a shorter side is left when a large picture shrinks
MAX_ASPECT = 100  # an encoder scales the shorter side: a line of one pixel would fill the memory


@contextlib.contextmanager
def open_picture(
    source: str | Callable, where: str, image_size: int | None = None, kind: type[ValueError] = ValueError
) -> Iterator[Image.Image]:
    """The picture in a file, or in what `source()` gives, not decoded yet; a JPEG's decoder may shrink it.
    For whatever is wrong with it, inside the block too, an error of type `kind` in one line that begins with
    `where`: Pillow's decoders raise whatever comes up in a broken file."""
    try:
        with Image.open(source() if callable(source) else source, formats=FORMATS) as image:
            width, height = image.size
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{width} x {height} pixels, one side over {MAX_ASPECT} times the other")
            if image_size:
                image.draft(None, (OVERSAMPLING * image_size,) * 2)
            yield image
    except Exception as error:
        unknown = f"not a picture, expected {', '.join(FORMATS)}"
        found = unknown if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise kind(f"{where} ({found})") from None


def to_rgb(image: Any, image_size: int | None = None) -> Image.Image:
    """A PIL picture of any mode, or an array as `from_array` takes it; what is transparent is laid on white.
    A string is a path, a URL or base64. ValueError names what cannot be read."""
    if isinstance(image, (str, Path)):
        name = str(image) if len(str(image)) <= 200 else f"{str(image)[:40]}..."  # base64
        with open_picture(partial(_load, str(image)), f"cannot read image {name}", image_size) as opened:
            return to_rgb(opened, image_size)
    image = image if isinstance(image, Image.Image) else from_array(image)
    with contextlib.suppress(SyntaxError, struct.error, ValueError):  # a broken EXIF turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    factor = min(image.size) // (OVERSAMPLING * image_size) if image_size else 1
    return image.reduce(factor) if factor > 1 else image


def from_array(image: Any) -> Image.Image:
    """An array or tensor (H, W), (H, W, C) or (C, H, W) as a picture: floats and truth values from 0 to 1,
    uint16 from 0 to 65535, other integers from 0 to 255. ValueError for any other."""
    pixels = to_numpy_array(image)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    kind = pixels.dtype.str[1:]  # without the order of bytes
    most = 1 if kind[0] in "fb" else 65535 if kind == "u2" else 255
    fits = pixels.size > 0 and pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (1,), (3,), (4,))
    if not (fits and 0 <= pixels.min() <= pixels.max() <= most):  # NaN is neither
        values = f", {pixels.min():g} to {pixels.max():g}," if fits else ""
        found = f"an array {pixels.shape} of {pixels.dtype}{values}"
        raise ValueError(f"{found} is no picture: expected (H, W) or (H, W, 3), 0 to {most}")
    pixels = (pixels * (255 / most)).round().astype("uint8")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey by the range of 16 bits; 32-bit integers and floats by the picture's own, where NaN is the
    darkest and a picture of one value black."""
    values = to_numpy_array(image).astype("float64")  # (H, W)
    finite = values[abs(values) < float("inf")]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0, 0)
    if image.mode.startswith("I;16"):
        lowest, highest = 0, 65535
    transparent = values == image.info.get("transparency")
    values[values != values] = lowest
    grey = (values.clip(lowest, highest) - lowest) * (255 / ((highest - lowest) or 1))
    grey[transparent] = 255
    return Image.fromarray(grey.round().astype("uint8"))


def _load(source: str) -> str | io.BytesIO:
    """A path as it is; what a URL or base64 holds as a stream."""
    if source.startswith(("http://", "https://", "data:image/")):
        with urllib.request.urlopen(source, timeout=60) as answer:
            return io.BytesIO(answer.read())
    with contextlib.suppress(ValueError):  # no base64: a path of nothing
        if not os.path.isfile(source):  # noqa: PTH113 (pathlib's raises for a long name)
            return io.BytesIO(base64.b64decode("".join(source.split()), validate=True))
    return source
