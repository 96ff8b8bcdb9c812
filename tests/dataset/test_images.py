"""Files -> pictures: which formats, depths and transparency are read, what shrinks, and what is refused."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.errors import DataError
from dataset.pictures import open_image
from inference.pictures import check_image, pictures_in
from model.pictures import FORMATS, to_rgb

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
RAMP = np.array([[0, 257, 1000], [32768, 65278, 65535]], dtype=np.uint16)
RAMP_8 = [[0, 1, 4], [128, 254, 255]]


def saved(path, pixels, **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return str(path)


def read(path, image_size=None) -> np.ndarray:
    return np.asarray(open_image(str(path), "rows.jsonl:1", image_size))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Any program that is started leaves its name here."""
    for name in ("gs", "gswin64c"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "started"


@pytest.mark.parametrize("how", [open_image, check_image], ids=["open", "check"])
def test_a_postscript_file_named_png_starts_no_program(tmp_path, programs, how):
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: cannot read image .*a.png \(not a picture, expected PNG"
    ):
        how(str(tmp_path / "a.png"), "rows.jsonl:1")
    assert not programs.exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "ICO"])
def test_other_formats_are_no_pictures(tmp_path, kind):
    saved(tmp_path / "a.png", Image.new("RGB", (32, 32)), format=kind)
    with pytest.raises(DataError, match=r"a.png \(not a picture, expected PNG, JPEG"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", FORMATS)
def test_listed_formats_are_read_whatever_the_suffix(tmp_path, kind):
    saved(tmp_path / "a.png", Image.new("RGB", (32, 24), (200, 40, 40)), format=kind)
    assert read(tmp_path / "a.png").shape == (24, 32, 3)
    assert abs(read(tmp_path / "a.png").astype(int) - (200, 40, 40)).max() < 6
    check_image(str(tmp_path / "a.png"), "rows.jsonl:1")


def test_a_picture_larger_than_pillow_allows_is_refused_in_one_line(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.new("RGB", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"^rows.jsonl:1: cannot read image .*a.png \(Image size .*\)$"):
        read(path)


@pytest.mark.parametrize("said", ["", "\n", "one\ntwo"], ids=["nothing", "blank", "two_lines"])
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, said):
    path = saved(tmp_path / "a.png", Image.new("RGB", (4, 4)))

    def broken(*_):
        raise AssertionError(said)

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    expected = said.split("\n")[0] or "AssertionError"
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"rows.jsonl:1: cannot read image {path} ({expected})"


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("a.png", Image.fromarray(RAMP)),
        ("a.tif", Image.fromarray(RAMP)),
        ("b.tif", Image.fromarray(RAMP.astype(">u2"))),
    ],
    ids=["png", "tiff", "big_endian_tiff"],
)
def test_16_bits_become_8_by_their_own_range(tmp_path, name, picture):
    pixels = read(saved(tmp_path / name, picture))
    assert pixels[..., 0].tolist() == pixels[..., 2].tolist() == RAMP_8


def test_12_bits_in_16_stay_dark(tmp_path):
    assert read(saved(tmp_path / "a.png", np.full((2, 2), 4095, np.uint16))).max() == 16


def test_a_transparent_16_bit_grey_is_white(tmp_path):
    saved(tmp_path / "a.png", RAMP, transparency=1000)
    assert read(tmp_path / "a.png")[..., 0].tolist() == [[0, 1, 255], [128, 254, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_scaled_by_the_pictures_own_range(tmp_path, dtype):
    pixels = read(saved(tmp_path / "a.tif", np.array([[-1000, 0, 1000]], dtype=dtype)))
    assert pixels[..., 1].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_picture_of_one_32_bit_value_is_black(tmp_path, dtype):
    assert read(saved(tmp_path / "a.tif", np.full((2, 3), 7, dtype))).tolist() == [[[0] * 3] * 3] * 2


def test_what_is_no_number_does_not_spoil_a_float_picture(tmp_path):
    nan, inf = float("nan"), float("inf")
    pixels = read(saved(tmp_path / "a.tif", np.array([[nan, -inf, 0, 0.25, 0.5, inf]], np.float32)))
    assert pixels[..., 0].tolist() == [[0, 0, 0, 128, 255, 255]]
    assert not read(saved(tmp_path / "b.tif", np.full((1, 2), nan, np.float32))).any()


def half_transparent(mode: str) -> Image.Image:
    """Black: left opaque, right transparent."""
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        picture = picture.quantize(4)
        assert "transparency" in picture.info or picture.palette.mode == "RGBA"
    return picture if mode in ("RGBA", "P") else picture.convert(mode)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGBA", {}),
        ("a.png", "LA", {}),
        ("a.png", "P", {}),
        ("a.webp", "RGBA", {"lossless": True}),
        ("a.gif", "RGBA", {}),
        ("a.tif", "RGBA", {}),
        ("a.png", "RGB", {"transparency": (0, 0, 0)}),
    ],
    ids=["rgba", "la", "palette", "webp", "gif", "tiff", "colour_key"],
)
def test_transparency_is_laid_on_white(tmp_path, name, mode, options):
    pixels = read(saved(tmp_path / name, half_transparent(mode), **options))
    assert set(pixels[:, 4:].flatten()) == {255}
    assert set(pixels[:, :4].flatten()) == ({255} if options.get("transparency") else {0})


def test_half_transparency_is_half_white(tmp_path):
    assert set(read(saved(tmp_path / "a.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).flatten()) == {127}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize(
    ("size", "shrunk"),
    [((127, 300), (127, 300)), ((128, 300), (64, 150)), ((191, 200), (96, 100)), ((520, 1040), (65, 130))],
    ids=["below", "at", "not_to_the_third", "eighth"],
)
def test_from_eight_times_the_encoders_size_on_pictures_shrink(tmp_path, name, size, shrunk):
    saved(tmp_path / name, noise(*size))
    assert read(tmp_path / name, image_size=16).shape[:2] == shrunk
    assert read(tmp_path / name).shape[:2] == size


def test_shrinking_keeps_the_colours_and_the_orientation(tmp_path):
    picture = Image.new("RGB", (400, 200), "red")
    picture.paste("blue", (0, 0, 200, 200))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    pixels = read(saved(tmp_path / "a.jpg", picture, exif=exif), image_size=16)
    assert pixels.shape == (200, 100, 3)
    assert pixels[20, 50, 2] > 240 and pixels[180, 50, 0] > 240


def test_pictures_of_ordinary_size_give_the_pixel_values_of_before(tmp_path, processor):
    """224 pixels: up to a shorter side of 1791."""
    path = saved(tmp_path / "a.jpg", noise(1791, 1800))
    with Image.open(path) as picture:
        expected = processor.image_processor([picture.convert("RGB")], return_tensors="pt")["pixel_values"]
    opened = open_image(path, "rows.jsonl:1", processor.image_size)
    assert torch.equal(processor.pixel_values([opened]), expected)
    assert torch.equal(processor.pixel_values([path]), expected)


def test_a_large_picture_is_the_same_from_a_file_and_by_path(tmp_path, processor):
    path = saved(tmp_path / "a.jpg", noise(2000, 1800))
    opened = open_image(path, "rows.jsonl:1", processor.image_size)
    assert opened.size == (900, 1000)
    assert torch.equal(processor.pixel_values([opened]), processor.pixel_values([path]))


def test_pictures_in_a_folder(tmp_path):
    kept = [
        "a.JPG",
        "b.bmp",
        "c.gif",
        "d.tif",
        "e.tiff",
        "f.avif",
        "g.jfif",
        "h.jp2",
        "i.webp",
        "j.png",
        "k.jpeg",
    ]
    for name in [*kept, ".hidden.png", "._a.png", "notes.txt", "x.ps", "y.ppm"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in pictures_in(tmp_path)] == kept
    assert pictures_in(tmp_path / "nowhere") == []


def test_a_picture_that_was_given_is_left_as_it_was():
    stream = io.BytesIO()
    Image.fromarray(noise(400, 400)).save(stream, "JPEG")
    picture = Image.open(stream)
    assert to_rgb(picture, 16).size == (67, 67) and picture.size == (400, 400)
