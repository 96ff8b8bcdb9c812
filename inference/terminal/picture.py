"""Pictures drawn with characters in a terminal that has the colours for it."""

import sys

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 48, 20  # at most


def draw(picture: Image.Image) -> None:
    """Prints an RGB picture, two pixels to a character; nothing where output is no terminal, where NO_COLOR
    is set, or where there are fewer than 256 colours."""
    console = Console()
    colourful = console.color_system in ("256", "truecolor") and not console.no_color
    if not sys.stdout.isatty() or not colourful:
        return
    small = picture.copy()
    small.thumbnail((min(COLUMNS, console.width), 2 * min(LINES, max(console.height - 4, 1))))
    for y in range(0, small.height - small.height % 2, 2):
        line = Text()
        for x in range(small.width):
            upper, lower = (Color.from_rgb(*small.getpixel((x, y + below))) for below in (0, 1))
            line.append("▀", Style(color=upper, bgcolor=lower))
        console.print(line)
