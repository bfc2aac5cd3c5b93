"""Paints the small world's scenes: pictures with the mask of their subject, by Pillow, the same from every seed."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .places import paint_place
from .textures import material_texture, pattern_texture
from .world import SIDE, Colour, Scene, Subject

_FINE = 3
"""Painted so many times larger, then reduced: smooth edges."""
_WIDTH = SIDE * _FINE
_INK = (25, 22, 30)
_PEN = 4
"""Width of outlines, in pixels of the fine picture."""

Point = tuple[float, float]
Shape = Callable[..., None]


def paint(scene: Scene) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The picture uint8 [128, 128, 3] and the mask of its subject, bool [128, 128]."""
    rng = random.Random(scene.seed)
    picture = paint_place(scene.place, _WIDTH, rng)
    brush = _Brush(picture, scene)
    _PAINTERS[scene.subject.name](brush, scene.subject)
    small = picture.reduce(_FINE)
    return np.asarray(small), np.asarray(brush.mask.reduce(_FINE)) > 127


class _Brush:
    """Paints the parts of one subject, in coordinates of its own: -1..1, y downwards, and keeps its mask."""

    def __init__(self, picture: Image.Image, scene: Scene) -> None:
        self.mask = Image.new("L", picture.size, 0)
        self._picture = picture
        self._scene = scene
        self._scale = scene.size * _WIDTH
        self._sign = -1 if scene.flipped else 1

    def polygon(self, points: list[Point], colour: Colour | None = None) -> None:
        """A polygon in this colour; None: with the subject's pattern."""
        places = [self._place(x, y) for x, y in points]
        self._part(lambda draw, **style: draw.polygon(places, **style), _bounds(places), colour)

    def ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour | None = None) -> None:
        """An ellipse in this box."""
        box = self._box(left, top, right, bottom)
        self._part(lambda draw, **style: draw.ellipse(box, **style), box, colour)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, colour: Colour | None = None, radius: float = 0.0
    ) -> None:
        """A rectangle, its corners rounded by this radius."""
        box = self._box(left, top, right, bottom)
        corner = radius * self._scale
        self._part(lambda draw, **style: draw.rounded_rectangle(box, corner, **style), box, colour)

    def ring(self, left: float, top: float, right: float, bottom: float, width: float, colour: Colour) -> None:
        """A round handle: the border of an ellipse."""
        box = self._box(left, top, right, bottom)
        wide = max(3, int(width * self._scale))
        for draw, ink in ((ImageDraw.Draw(self._picture), _INK), (ImageDraw.Draw(self.mask), 255)):
            draw.ellipse(_grown(box, _PEN), outline=ink, width=wide + 2 * _PEN)
        hole = Image.new("L", self.mask.size, 0)
        ImageDraw.Draw(hole).ellipse(box, outline=255, width=wide)
        self._fill(hole, box, colour)

    def _part(self, shape: Shape, box: tuple[float, ...], colour: Colour | None) -> None:
        inside = Image.new("L", self.mask.size, 0)
        shape(ImageDraw.Draw(inside), fill=255)
        self._fill(inside, box, colour)
        shape(ImageDraw.Draw(self._picture), outline=_INK, width=_PEN)
        shape(ImageDraw.Draw(self.mask), fill=255, outline=255, width=_PEN)

    def _fill(self, inside: Image.Image, box: tuple[float, ...], colour: Colour | None) -> None:
        subject, material = self._scene.subject, self._scene.material
        corner = (max(0, int(box[0])), max(0, int(box[1])))
        size = (max(1, int(box[2]) - corner[0] + 1), max(1, int(box[3]) - corner[1] + 1))
        if material is not None:
            texture = material_texture(material, size, random.Random(f"{self._scene.seed}:{box}"))
            if colour is not None:
                texture = texture.point(lambda value: int(value * 0.82))
        elif colour is not None:
            texture = Image.new("RGB", size, colour)
        else:
            texture = pattern_texture(subject.pattern, size, subject.colours[0], subject.colours[1], subject.count)
        cut = inside.crop((corner[0], corner[1], corner[0] + size[0], corner[1] + size[1]))
        self._picture.paste(texture, corner, cut)

    def _place(self, x: float, y: float) -> Point:
        scene = self._scene
        return scene.x * _WIDTH + self._sign * x * self._scale, scene.y * _WIDTH + y * self._scale

    def _box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return _bounds([self._place(left, top), self._place(right, bottom)])


def _bounds(points: list[Point]) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _grown(box: tuple[float, float, float, float], by: float) -> tuple[float, float, float, float]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _cup(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    foot = 0.4 + 0.3 * a
    brush.ring(0.35, -0.4 + 0.2 * b, 1.0, 0.4 + 0.2 * b, 0.15, other)
    brush.polygon([(-0.65, -0.7), (0.65, -0.7), (foot, 0.8), (-foot, 0.8)])
    brush.ellipse(-0.65, -0.86, 0.65, -0.54, other)


def _car(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    roof = -0.55 - 0.2 * b
    brush.polygon([(-0.6, -0.1), (-0.35 - 0.15 * a, roof), (0.35, roof), (0.65, -0.1)], other)
    brush.rectangle(-1.0, -0.2, 1.0, 0.45, radius=0.15)
    for x in (-0.55, 0.55):
        brush.ellipse(x - 0.28, 0.18, x + 0.28, 0.74, (40, 40, 45))
        brush.ellipse(x - 0.12, 0.34, x + 0.12, 0.58, other)


def _house(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    brush.rectangle(0.3, -0.95, 0.52, -0.3, other)
    brush.rectangle(-0.75, -0.25, 0.75, 0.85)
    brush.polygon([(-0.95, -0.25), (-0.5 * b, -0.75 - 0.25 * a), (0.5 * b, -0.75 - 0.25 * a), (0.95, -0.25)], other)
    brush.rectangle(-0.2, 0.25, 0.2, 0.85, other)


def _robot(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    head = 0.34 + 0.14 * a
    for x in (-0.3, 0.3):
        brush.rectangle(x - 0.13, 0.5, x + 0.13, 0.95, other)
    for x in (-0.72, 0.72):
        brush.rectangle(x - 0.12, -0.12, x + 0.12, 0.35 + 0.2 * b, other)
    brush.rectangle(-0.58, -0.2, 0.58, 0.62, radius=0.08)
    brush.rectangle(-head, -0.85, head, -0.2, other, radius=0.08)
    for x in (-0.17, 0.17):
        brush.ellipse(x - 0.11, -0.66, x + 0.11, -0.44, subject.colours[1])


def _boat(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    brush.rectangle(-0.06, -0.9, 0.06, 0.3, (110, 75, 45))
    brush.polygon([(0.06, -0.85), (0.06, 0.12), (0.6 + 0.3 * a, 0.12)])
    brush.polygon([(-0.06, -0.6), (-0.06, 0.12), (-0.35 - 0.3 * a, 0.12)])
    brush.polygon([(-1.0, 0.22), (1.0, 0.22), (0.45 + 0.3 * b, 0.75), (-0.45 - 0.3 * b, 0.75)], subject.colours[2])


def _fish(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    tail, height = 0.4 + 0.2 * a, 0.45 + 0.2 * b
    brush.polygon([(0.45, 0.0), (1.0, -tail), (1.0, tail)], other)
    brush.polygon([(-0.25, -height * 0.7), (0.1, -height - 0.3), (0.35, -height * 0.7)], other)
    brush.ellipse(-0.95, -height, 0.7, height)
    brush.ellipse(-0.74, -0.3, -0.46, -0.02, (245, 245, 245))
    brush.ellipse(-0.68, -0.22, -0.54, -0.08, _INK)


def _bag(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    brush.ring(-0.42, -0.95 + 0.15 * b, 0.42, 0.15, 0.12, other)
    top = 0.5 + 0.25 * a
    brush.polygon([(-top, -0.4), (top, -0.4), (0.85, 0.85), (-0.85, 0.85)])
    brush.rectangle(-0.16, -0.5, 0.16, -0.2, other)


def _hat(brush: _Brush, subject: Subject) -> None:
    a, b = subject.shape
    other = subject.colours[2]
    brush.ellipse(-1.0, 0.22, 1.0, 0.7, other)
    width, top = 0.45 + 0.2 * b, -0.5 - 0.3 * a
    brush.polygon([(-width, top), (width, top), (0.6, 0.4), (-0.6, 0.4)])
    brush.polygon([(-0.59, 0.2), (0.59, 0.2), (0.6, 0.42), (-0.6, 0.42)], other)


_PAINTERS: dict[str, Callable[[_Brush, Subject], None]] = {
    "cup": _cup,
    "car": _car,
    "house": _house,
    "robot": _robot,
    "boat": _boat,
    "fish": _fish,
    "bag": _bag,
    "hat": _hat,
}
