"""The small world's places: backgrounds that differ at a glance."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from .world import Colour


def paint_place(place: str | None, width: int, rng: random.Random) -> Image.Image:
    """A square picture of the place; None: plain paper."""
    horizon = int(width * rng.uniform(0.55, 0.68))
    if place is None:
        shade = rng.randint(225, 255)
        return Image.new("RGB", (width, width), (shade, shade, shade))
    sky, ground, decorate = _PLACES[place]
    picture = _gradient(_near(sky[0], rng), _near(sky[1], rng), width)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, horizon, width, width), fill=_near(ground, rng))
    decorate(draw, width, horizon, rng)
    return picture


def _gradient(top: Colour, bottom: Colour, width: int) -> Image.Image:
    share = np.linspace(0, 1, width)[:, None]
    column = np.array(top, float) * (1 - share) + np.array(bottom, float) * share
    return Image.fromarray(np.repeat(column.astype(np.uint8)[:, None], width, axis=1))


def _near(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in colour)
    return red, green, blue


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _beach(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng: random.Random) -> None:
    draw.rectangle((0, horizon - 45, width, horizon + 8), fill=_near((35, 110, 200), rng))
    _dot(draw, rng.choice((0.14, 0.86)) * width, 0.13 * width, 28, (255, 240, 120))


def _snow(draw: ImageDraw.ImageDraw, width: int, _: int, rng: random.Random) -> None:
    for _flake in range(20):
        _dot(draw, rng.uniform(0, width), rng.uniform(0, width), 8, (255, 255, 255))


def _forest(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng: random.Random) -> None:
    for i in range(6):
        x = (i + rng.uniform(0.25, 0.75)) / 6 * width
        draw.rectangle((x - 13, 0, x + 13, horizon), fill=_near((84, 58, 36), rng))


def _city(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng: random.Random) -> None:
    x = -rng.randint(0, 30)
    while x < width:
        house, top = rng.randint(48, 74), rng.randint(40, int(horizon * 0.6))
        draw.rectangle((x, top, x + house - 6, horizon), fill=_near((48, 48, 68), rng))
        for left in range(x + 9, x + house - 20, 26):
            for upper in range(top + 14, horizon - 14, 34):
                if rng.random() < 0.6:
                    draw.rectangle((left, upper, left + 14, upper + 18), fill=(255, 216, 110))
        x += house


def _desert(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng: random.Random) -> None:
    for x in (rng.uniform(0.05, 0.35) * width, rng.uniform(0.65, 0.95) * width):
        draw.polygon([(x - 95, horizon), (x, horizon - 80), (x + 95, horizon)], fill=_near((196, 136, 72), rng))


def _water(draw: ImageDraw.ImageDraw, width: int, _: int, rng: random.Random) -> None:
    for _bubble in range(9):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, width * 0.9), rng.uniform(10, 18)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(170, 226, 250), width=4)


def _moon(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng: random.Random) -> None:
    for _star in range(14):
        _dot(draw, rng.uniform(0, width), rng.uniform(0, horizon - 8), 5, (255, 255, 255))
    for _crater in range(5):
        x, y, radius = rng.uniform(0, width), rng.uniform(horizon + 14, width), rng.uniform(16, 34)
        draw.ellipse((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=(106, 106, 112))


def _meadow(draw: ImageDraw.ImageDraw, width: int, horizon: int, rng: random.Random) -> None:
    for _flower in range(14):
        colour = rng.choice(((255, 255, 255), (255, 222, 60), (240, 90, 150)))
        _dot(draw, rng.uniform(0, width), rng.uniform(horizon + 8, width), 9, colour)


_Decorate = Callable[[ImageDraw.ImageDraw, int, int, random.Random], None]
_PLACES: dict[str, tuple[tuple[Colour, Colour], Colour, _Decorate]] = {
    "beach": (((110, 190, 250), (205, 235, 255)), (238, 214, 150), _beach),
    "snow": (((150, 176, 208), (214, 226, 238)), (244, 248, 252), _snow),
    "forest": (((58, 108, 66), (28, 66, 38)), (50, 96, 40), _forest),
    "city": (((12, 12, 44), (58, 34, 78)), (58, 58, 64), _city),
    "desert": (((248, 190, 120), (255, 228, 170)), (222, 166, 92), _desert),
    "water": (((30, 150, 200), (10, 84, 150)), (150, 140, 96), _water),
    "moon": (((6, 6, 12), (6, 6, 12)), (152, 152, 158), _moon),
    "meadow": (((128, 200, 255), (214, 242, 255)), (92, 190, 72), _meadow),
}
