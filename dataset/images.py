"""The pictures that rows name. How one is opened is model/pictures.py's, which travels with exports."""

from PIL import Image

from dataset.errors import DataError
from model.pictures import open_picture, to_rgb

PIXELS_VERSION = 2  # raise it where a file gives other pixels than before: stored features are then made anew


def open_image(path: str, where: str, image_size: int | None = None) -> Image.Image:
    """The picture at `path`, upright and RGB, shrunk if far too large for an encoder of `image_size` pixels.

    DataError names the row (`where`) and the file that cannot be read.
    """
    with open_picture(path, f"{where}: cannot read image {path}", image_size, DataError) as image:
        return to_rgb(image, image_size)
