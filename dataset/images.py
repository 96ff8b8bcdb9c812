"""Image files -> upright RGB pictures, and which files of a folder are such."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from dataset.errors import DataError

SHIPPED_PICTURES = "dataset/eval_images"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_ASPECT = 100  # an encoder scales the shorter side: a line of one pixel would fill the memory


def open_image(path: str, where: str) -> Image.Image:
    """The picture at `path`; DataError names the row (`where`) and the file that cannot be read."""
    with _opened(path, where) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def check_image(path: str, where: str) -> None:
    """The DataError that `open_image` would raise, found in less time."""
    with _opened(path, where) as image:
        image.draft("L", (1, 1))  # a JPEG at an eighth of its size: 4 to 8 times as fast
        image.load()  # verify() would not see that a JPEG is cut off


@contextlib.contextmanager
def _opened(path: str, where: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                width, height = image.size
                raise ValueError(f"{width} x {height} pixels, one side over {MAX_ASPECT} times the other")
            yield image
    except Exception as error:  # Pillow's decoders raise whatever comes up in a broken file
        raise DataError(f"{where}: cannot read image {path} ({error})") from None


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by their suffix, sorted; none where there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
