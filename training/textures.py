"""What the small world's things are covered with: patterns in two colours, and materials."""

import random

import numpy as np
from PIL import Image, ImageDraw

from .world import Colour

Size = tuple[int, int]
_GRAIN = 18
"""Distance of a material's features, in pixels of the fine picture."""


def pattern_texture(pattern: str, size: Size, body: Colour, mark: Colour, count: int) -> Image.Image:
    """A picture of this size in the body's colour with `count` stripes, rows of dots, ... in the other."""
    width, height = size
    texture = Image.new("RGB", size, body)
    draw = ImageDraw.Draw(texture)
    if pattern == "stripes":
        for i in range(count):
            draw.rectangle(
                (0, height * (4 * i + 1) / (4 * count), width, height * (4 * i + 3) / (4 * count)), fill=mark
            )
    elif pattern == "bars":
        for i in range(count):
            draw.rectangle((width * (4 * i + 1) / (4 * count), 0, width * (4 * i + 3) / (4 * count), height), fill=mark)
    elif pattern == "dots":
        radius = 0.3 * min(width, height) / count
        for x, y in _grid(count, count):
            draw.ellipse((x * width - radius, y * height - radius, x * width + radius, y * height + radius), fill=mark)
    elif pattern == "check":
        for i in range(count):
            for j in range(i % 2, count, 2):
                box = (width * i / count, height * j / count, width * (i + 1) / count, height * (j + 1) / count)
                draw.rectangle(box, fill=mark)
    elif pattern == "half":
        draw.rectangle((0, height / 2, width, height), fill=mark)
    return texture


def material_texture(material: str, size: Size, rng: random.Random) -> Image.Image:
    """A picture of this size of wood, gold, ice, stone or grass."""
    width, height = size
    if material == "gold":
        slope = np.add.outer(np.arange(height), np.arange(width)) / (height + width)
        light = 0.5 + 0.5 * np.cos(slope * 9.0 + rng.uniform(0, 6.28))
        bright, dark = np.array((255, 232, 120.0)), np.array((176, 122, 20.0))
        return Image.fromarray((light[..., None] * bright + (1 - light[..., None]) * dark).astype(np.uint8))
    base = {"wood": (166, 110, 62), "ice": (178, 224, 246), "stone": (142, 142, 146), "grass": (82, 158, 60)}[material]
    texture = Image.new("RGB", size, base)
    draw = ImageDraw.Draw(texture)
    for _ in range(max(4, width * height // (_GRAIN * _GRAIN))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if material == "stone":
            radius, tone = rng.uniform(4, 11), rng.choice((96, 112, 176, 190))
            draw.ellipse((x - radius, y - radius * 0.7, x + radius, y + radius * 0.7), fill=(tone, tone, tone + 4))
        elif material == "grass":
            blade = rng.choice(((46, 112, 36), (128, 204, 84), (60, 136, 44)))
            draw.line((x, y, x + rng.uniform(-7, 7), y - 20), fill=blade, width=4)
        elif material == "ice":
            draw.line((x, y, x + 26, y - 30), fill=rng.choice(((240, 250, 255), (128, 190, 230))), width=3)
    if material == "wood":
        for y in range(rng.randint(0, 12), height, 15):
            draw.line((0, y, width, y + rng.randint(-3, 3)), fill=(112, 68, 36), width=5)
    return texture


def _grid(columns: int, rows: int) -> list[tuple[float, float]]:
    return [((i + 0.5) / columns, (j + 0.5) / rows) for i in range(columns) for j in range(rows)]
