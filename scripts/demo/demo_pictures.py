"""Composes the demo's pictures: drawings of things on a plain or graded background, 96 x 96.

Half of the pictures show one large thing, half show one to three small ones, each in its own cell of a
3 x 3 grid. Everything random comes from the generator that is passed in, so a seed fixes a picture.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

DEMO_DIR = Path(__file__).resolve().parents[2] / "dataset" / "demo"
PICTURE_SIZE = 96
CELL = PICTURE_SIZE // 3

Sprites = dict[str, dict[str, Image.Image]]  # name -> style -> drawing


@dataclass(frozen=True)
class Thing:
    """One drawing in a picture; `cell` counts the grid's cells in reading order, None for a large thing."""

    name: str
    style: str
    cell: int | None
    size: int
    left: int
    top: int


def load_world() -> dict:
    return json.loads((DEMO_DIR / "world.json").read_text(encoding="utf-8"))


def load_sprites(held_out: bool) -> Sprites:
    """The held-out style's drawings, or all others', decoded, by English name and style."""
    style_filter = ("style", "==" if held_out else "!=", load_world()["held_out_style"])
    table = pq.read_table(DEMO_DIR / "sprites.parquet", filters=[style_filter])
    sprites: Sprites = {}
    for row in table.to_pylist():
        drawing = Image.open(io.BytesIO(row["image"]), formats=["WEBP"]).convert("RGBA")
        sprites.setdefault(row["name"], {})[row["style"]] = drawing
    return sprites


def random_scene(rng: np.random.Generator, sprites: Sprites, large: bool) -> list[Thing]:
    """The things of one picture, in reading order; names differ within a picture."""
    count = 1 if large else int(rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4]))
    names = rng.choice(list(sprites), count, replace=False)
    cells = [None] if large else sorted(rng.choice(9, count, replace=False).tolist())
    return [place(rng, str(name), list(sprites[name]), cell) for name, cell in zip(names, cells, strict=True)]


def place(rng: np.random.Generator, name: str, styles: list[str], cell: int | None) -> Thing:
    style = styles[rng.integers(len(styles))]
    if cell is None:
        size = round(PICTURE_SIZE * rng.uniform(0.5, 0.95))
        left, top = (int(rng.integers(0, PICTURE_SIZE - size + 1)) for _ in range(2))
        return Thing(name, style, None, size, left, top)
    size = round(CELL * rng.uniform(0.8, 1.1))
    corner = [CELL * axis + (CELL - size) / 2 + rng.uniform(-3, 3) for axis in (cell % 3, cell // 3)]
    left, top = (min(max(round(position), 0), PICTURE_SIZE - size) for position in corner)
    return Thing(name, style, cell, size, left, top)


def paint(
    rng: np.random.Generator,
    scene: list[Thing],
    sprites: Sprites,
    change: Callable[[Image.Image], Image.Image] | None = None,
) -> tuple[Image.Image, list[Image.Image]]:
    """The RGB picture, and for each thing its (96, 96) mask; `change` alters each drawing first."""
    picture = background(rng)
    masks = []
    for thing in scene:
        drawing = sprites[thing.name][thing.style]
        if change is not None:
            drawing = change(drawing)
        drawing = drawing.resize((thing.size, thing.size), Image.Resampling.LANCZOS)
        alpha = drawing.getchannel("A")
        picture.paste(drawing, (thing.left, thing.top), alpha)
        mask = Image.new("L", picture.size)
        mask.paste(alpha, (thing.left, thing.top))
        masks.append(mask)
    return picture, masks


def background(rng: np.random.Generator) -> Image.Image:
    """Light in 80 % of the pictures, otherwise dark; white, another plain colour, or graded between two."""
    low, high = (170, 256) if rng.random() < 0.8 else (0, 90)
    first, second = rng.integers(low, high, (2, 3))
    style = rng.random()
    if style < 0.15 and low > 0:
        first = np.full(3, 255)
    if style < 0.5:
        return Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), tuple(first.tolist()))
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, PICTURE_SIZE, dtype=np.float32)
    share = 0.5 + (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]) / np.sqrt(2)
    colours = first + share[..., None].astype(np.float32) * (second - first).astype(np.float32)
    return Image.fromarray(colours.astype(np.uint8))
