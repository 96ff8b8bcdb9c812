"""Which files of a folder are pictures, and whether they can be read, before a model is asked about them."""

from functools import partial
from pathlib import Path

from PIL import Image

from dataset.errors import DataError
from dataset.pictures import picture_file, picture_name
from model.pictures import FORMATS, open_picture

SHIPPED_PICTURES = "dataset/eval_images"
PICTURE_SUFFIXES = tuple(
    suffix for name in FORMATS for suffix, its in Image.registered_extensions().items() if its == name
)


def check_image(path: str, where: str) -> None:
    """The DataError that `open_image` would raise, found in less time."""
    told = f"{where}: cannot read image {picture_name(path)}"
    with open_picture(partial(picture_file, path), told, kind=DataError) as image:
        image.draft("L", (1, 1))  # a JPEG at an eighth of its size: 4 to 8 times as fast
        image.load()  # verify() would not see that a JPEG is cut off


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by their suffix, sorted, hidden ones (a Mac's `._a.png`) left out; none
    where there is no such folder."""
    found = (path for path in folder.glob("[!.]*") if path.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(path for path in found if path.is_file())
