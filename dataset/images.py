"""Image files -> upright RGB pictures, and which files of a folder are such.

Formats, bit depths and transparency are model/processing_vlm.py's, since they travel with an export.
"""

from pathlib import Path

from PIL import Image

from dataset.errors import DataError
from model.pictures import FORMATS, open_picture, to_rgb

SHIPPED_PICTURES = "dataset/eval_images"
PICTURE_SUFFIXES = tuple(
    suffix for name in FORMATS for suffix, its in Image.registered_extensions().items() if its == name
)
PIXELS_VERSION = 2  # raise it where a file gives other pixels than before: stored features are then made anew


def open_image(path: str, where: str, image_size: int | None = None) -> Image.Image:
    """The picture at `path`, shrunk if far too large for an encoder of `image_size` pixels.

    DataError names the row (`where`) and the file that cannot be read.
    """
    with open_picture(path, f"{where}: cannot read image {path}", image_size, DataError) as image:
        return to_rgb(image, image_size)


def check_image(path: str, where: str) -> None:
    """The DataError that `open_image` would raise, found in less time."""
    with open_picture(path, f"{where}: cannot read image {path}", kind=DataError) as image:
        image.draft("L", (1, 1))  # a JPEG at an eighth of its size: 4 to 8 times as fast
        image.load()  # verify() would not see that a JPEG is cut off


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by their suffix, sorted, hidden ones (a Mac's `._a.png`) left out; none
    where there is no such folder."""
    found = (path for path in folder.glob("[!.]*") if path.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(path for path in found if path.is_file())
