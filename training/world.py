"""The small world: what there is in it, and which of it training never sees.

A subject has a class, two continuous parameters of its shape, three colours and a pattern; a scene puts it somewhere,
or makes it of something. Everything is drawn from a seed, so that picture number n is the same everywhere.
"""

import colorsys
import hashlib
import random
from dataclasses import dataclass

Colour = tuple[int, int, int]

SIDE = 128
"""Pixels of a picture's side."""

CLASSES = ("cup", "car", "house", "robot", "boat", "fish", "bag", "hat")
PLACES = ("beach", "snow", "forest", "city", "desert", "water", "moon", "meadow")
MATERIALS = ("wood", "gold", "ice", "stone", "grass")
PATTERNS = ("plain", "stripes", "bars", "dots", "check", "half")

HELD_OUT_SHARE = 0.1
"""Of the subjects' kinds, see `Subject.kind`."""

HELD_OUT_PLACES = {name: PLACES[(3 * i + 1) % len(PLACES)] for i, name in enumerate(CLASSES)}
"""For each class the place where training never shows it."""

_HUES = 8


@dataclass(frozen=True)
class Subject:
    """What makes a thing this thing.

    Attributes:
        name: One of `CLASSES`.
        shape: Two numbers in 0..1; what they change depends on the class.
        colours: Of the body, of its pattern, of its other parts.
        pattern: One of `PATTERNS`.
        count: How often the pattern repeats, 2 or 3.
    """

    name: str
    shape: tuple[float, float]
    colours: tuple[Colour, Colour, Colour]
    pattern: str
    count: int

    @property
    def kind(self) -> str:
        """Class, pattern and the rough hues of body and pattern: what is held out together."""
        hues = (int(colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0] * _HUES) for colour in self.colours[:2])
        return "-".join([self.name, self.pattern, *map(str, hues)])

    @property
    def held_out(self) -> bool:
        """Whether training never sees subjects of this kind."""
        digest = hashlib.sha256(self.kind.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class Scene:
    """A subject somewhere.

    Attributes:
        place: One of `PLACES`; None: on plain paper, as on a product photo.
        material: One of `MATERIALS`: what it is made of in place of its own colours; None: as it is.
        x, y: Its middle, in 0..1 of the picture.
        size: Half its width, in 0..1 of the picture.
        flipped: Mirrored left to right.
        seed: Of everything in the place that is left to chance.
    """

    subject: Subject
    place: str | None
    material: str | None
    x: float
    y: float
    size: float
    flipped: bool
    seed: int


def draw_subject(rng: random.Random, name: str | None = None, held_out: bool = False) -> Subject:
    """A subject by chance, of this class if one is named; held out from training, or not."""
    while True:
        subject = Subject(
            name=name or rng.choice(CLASSES),
            shape=(rng.random(), rng.random()),
            colours=_colours(rng),
            pattern=rng.choice(PATTERNS),
            count=rng.randint(2, 3),
        )
        if subject.held_out == held_out:
            return subject


def draw_scene(rng: random.Random, subject: Subject, place: str | None, material: str | None = None) -> Scene:
    """The subject in this place (None: on paper), the rest by chance."""
    return Scene(
        subject=subject,
        place=place,
        material=material,
        x=rng.uniform(0.45, 0.55),
        y=rng.uniform(0.50, 0.58),
        size=rng.uniform(0.30, 0.40),
        flipped=rng.random() < 0.5,
        seed=rng.getrandbits(32),
    )


def trained_places(name: str) -> list[str]:
    """The places in which training shows a class."""
    return [place for place in PLACES if place != HELD_OUT_PLACES[name]]


def _colours(rng: random.Random) -> tuple[Colour, Colour, Colour]:
    """A body, a pattern that differs from it well, and other parts (often white or dark)."""
    body = _vivid(rng)
    pattern = body
    while sum(abs(a - b) for a, b in zip(body, pattern, strict=True)) < 200:
        pattern = _vivid(rng) if rng.random() < 0.75 else rng.choice(((245, 245, 245), (40, 40, 45)))
    return body, pattern, rng.choice(((245, 245, 245), (40, 40, 45), _vivid(rng), _vivid(rng)))


def _vivid(rng: random.Random) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.55, 1.0))
    return int(red * 255), int(green * 255), int(blue * 255)
