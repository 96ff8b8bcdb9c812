"""The pictures of rows: files, or bytes that stood in the data files, which lie once in a store by the table.

A row of the table names a picture by its path, or by its place in the store, "\\0{offset}:{length}", which no
path can be. Everywhere else a picture is one string: a path, or the store's path and the place. Its bytes are
read when it is opened: a map would count as memory of each process. Decoding is model/pictures.py's.
"""

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dataset.errors import DataError
from dataset.files import sha256_of
from model.pictures import open_picture, to_rgb

MID_GREY = (128, 128, 128)  # a picture that shows nothing
PIXELS_VERSION = 2  # raise it where a file gives other pixels than before: stored features are then made anew


def open_image(picture: str, where: str, image_size: int | None = None) -> Image.Image:
    """A picture, upright and RGB, shrunk if far too large for an encoder of `image_size` pixels. DataError
    names the row (`where`) and the picture that cannot be read."""
    told = f"{where}: cannot read image {picture_name(picture)}"
    with open_picture(partial(picture_file, picture), told, image_size, DataError) as image:
        return to_rgb(image, image_size)


class PictureStore:
    """Writes a store; memory grows by some 200 bytes for each distinct picture."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.places: dict[bytes, str] = {}  # by digest

    def add(self, content: bytes) -> str:
        """The picture's place."""
        digest = hashlib.sha256(content).digest()
        if digest not in self.places:
            self.places[digest] = f"\0{self.file.tell()}:{len(content)}"
            self.file.write(content)
        return self.places[digest]


def picture_file(picture: str) -> str | io.BytesIO:
    """The path of a picture, or its bytes from the store; OSError where the store is gone."""
    store, _, place = picture.partition("\0")
    if not place:
        return store
    offset, length = map(int, place.split(":"))
    with Path(store).open("rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def picture_digest(picture: str) -> str:
    """SHA-256 of a picture's content, in hexadecimal; OSError if it cannot be read."""
    file = picture_file(picture)
    return sha256_of(Path(file)) if isinstance(file, str) else hashlib.sha256(file.getbuffer()).hexdigest()


def picture_name(picture: str) -> str:
    """For messages: the path, or how many bytes it has."""
    path, _, place = picture.partition("\0")
    return f"of {int(place.split(':')[1]):,} bytes" if place else path
