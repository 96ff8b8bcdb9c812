"""The pictures that rows name. How one is opened is model/pictures.py's, which travels with exports."""

from functools import partial

from PIL import Image

from dataset.errors import DataError
from dataset.picture_store import picture_file, picture_name
from model.pictures import open_picture, to_rgb

PIXELS_VERSION = 2  # raise it where a file gives other pixels than before: stored features are then made anew


def open_image(picture: str, where: str, image_size: int | None = None) -> Image.Image:
    """A picture, by path or by store and place, upright and RGB, shrunk if far too large for an encoder of
    `image_size` pixels.

    DataError names the row (`where`) and the picture that cannot be read.
    """
    told = f"{where}: cannot read image {picture_name(picture)}"
    with open_picture(partial(picture_file, picture), told, image_size, DataError) as image:
        return to_rgb(image, image_size)
