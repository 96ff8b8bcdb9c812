"""Image files -> upright RGB pictures."""

from PIL import Image, ImageOps

from dataset.errors import DataError


def open_image(path: str, where: str) -> Image.Image:
    """The picture at `path`; DataError names the row (`where`) and the file that cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever comes up in a broken file
        raise DataError(f"{where}: cannot read image {path} ({error})") from None
