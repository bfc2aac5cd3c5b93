"""What a picture shows, as a vector: the painter's own numbers. Takes the part of OpenCLIP's image embeddings.

The language model learns to say this vector of the picture that is asked for, before there is one.
"""

import torch
from torch import Tensor

from .world import CLASSES, MATERIALS, PATTERNS, PLACES, Scene

NAMED = {"class": CLASSES, "place": (None, *PLACES), "material": (None, *MATERIALS), "pattern": PATTERNS}
"""What is one of several, and of which."""

COLOURS, SHAPE, COUNT = slice(0, 9), slice(9, 11), slice(11, 12)
NUMBERS = 12
"""What is a number: three colours, two of shape, the pattern's count."""

SIZE = sum(len(among) for among in NAMED.values()) + NUMBERS
"""Of the vector; the adapter's embedding size."""


SHAPE_WEIGHT = 3.0
"""Of errors in the shape, which is the hardest to see."""


def part_of(name: str) -> slice:
    """Where in the vector one of `NAMED` is."""
    before = list(NAMED)[: list(NAMED).index(name)]
    first = sum(len(NAMED[other]) for other in before)
    return slice(first, first + len(NAMED[name]))


def weights() -> Tensor:
    """What errors in the vector weigh in training [SIZE]."""
    found = torch.ones(SIZE)
    found[SIZE - NUMBERS :][SHAPE] = SHAPE_WEIGHT
    return found


def names_of(scene: Scene) -> list[int]:
    """What of a scene is one of several, in the order of `NAMED`."""
    values = (scene.subject.name, scene.place, scene.material, scene.subject.pattern)
    return [among.index(value) for value, among in zip(values, NAMED.values(), strict=True)]


def numbers_of(scene: Scene) -> list[float]:
    """What of a scene is a number, each in -1..1: colours, shape, count."""
    subject = scene.subject
    colours = [value / 127.5 - 1 for colour in subject.colours for value in colour]
    return [*colours, *(2 * value - 1 for value in subject.shape), 2.0 * subject.count - 5]


def described(scene: Scene) -> Tensor:
    """The vector of a scene [SIZE]. A material hides colours and pattern: there they are 0."""
    parts = []
    for (name, among), index in zip(NAMED.items(), names_of(scene), strict=True):
        one = torch.zeros(len(among))
        if name != "pattern" or scene.material is None:
            one[index] = 1.0
        parts.append(one)
    numbers = torch.tensor(numbers_of(scene))
    if scene.material is not None:
        numbers[:9] = 0.0
        numbers[-1] = 0.0
    return torch.cat([*parts, numbers])
