"""Builds dataset/demo/sprites.parquet: the world's things as each emoji set draws them.

The drawings come from npm, the renderer from PyPI; neither is needed by anything else here:
    mkdir icons && cd icons && npm init -y && npm install @iconify-json/{noto,noto-v1,openmoji,...}
    pip install resvg-py
    python scripts/demo/make_demo_sprites.py --icons icons/node_modules/@iconify-json
"""

import io
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from demo_pictures import DEMO_DIR, load_world
from PIL import Image

SPRITE_SIZE = 64
RENDER_SIZE = 256  # drawn large, then reduced: thin lines survive better than when drawn at 64


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--icons", type=Path, required=True, help="folder that holds SET/icons.json of each set"
    )
    parser.add_argument("--out", type=Path, default=DEMO_DIR / "sprites.parquet", help="file to write")
    args = parser.parse_args()

    world = load_world()
    rows = []
    for style in world["styles"]:
        path = args.icons / style / "icons.json"
        if not path.is_file():
            sys.exit(f"error: {path} not found; install the npm package @iconify-json/{style}")
        icon_set = json.loads(path.read_text(encoding="utf-8"))
        for concept in world["concepts"]:
            icon = concept["icons"].get(style)
            if icon is not None:  # emojione and the two v1 sets lack some things
                image = encode(render(icon_set, icon))
                rows.append({"name": concept["en"], "style": style, "image": image})
    pq.write_table(pa.Table.from_pylist(rows), args.out, compression="none")  # WebP does not shrink further
    print(f"{args.out}: {len(rows)} sprites, {args.out.stat().st_size / 1e6:.1f} MB")


def render(icon_set: dict, name: str) -> Image.Image:
    """A (64, 64) RGBA sprite: what is drawn, cropped, fitted to the square and centred."""
    name = icon_set.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icon_set["icons"][name]
    box = [
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE)
    drawing = Image.open(io.BytesIO(bytes(png)), formats=["PNG"]).convert("RGBA")
    visible = drawing.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0)
    drawing = drawing.crop(visible.getbbox())
    scale = SPRITE_SIZE / max(drawing.size)
    size = [max(1, round(side * scale)) for side in drawing.size]
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    sprite.paste(drawing, [(SPRITE_SIZE - side) // 2 for side in drawing.size])
    return sprite


def encode(sprite: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sprite.save(buffer, "WEBP", lossless=True, method=6, quality=100)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
