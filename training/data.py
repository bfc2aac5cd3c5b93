"""The pictures that training sees: number n is the same everywhere.

Numbers 2i and 2i+1 show one subject: as it is, for a reference, and in another place or made of something.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .painter import paint
from .words import caption
from .world import MATERIALS, Scene, draw_scene, draw_subject, trained_places

PAPER_SHARE = 0.12
MATERIAL_SHARE = 0.4
"""Of the pictures with odd numbers."""


def scene_of(number: int) -> Scene:
    """The scene of a training picture: never a held-out subject, never a held-out pair of class and place."""
    subject = draw_subject(random.Random(f"subject {number // 2}"))
    rng = random.Random(f"scene {number}")
    place = None if rng.random() < PAPER_SHARE else rng.choice(trained_places(subject.name))
    material = rng.choice(MATERIALS) if number % 2 and rng.random() < MATERIAL_SHARE else None
    return draw_scene(rng, subject, place, material)


def to_tensor(picture: np.ndarray[Any, Any]) -> Tensor:
    """uint8 [H, W, 3] to [3, H, W] in -1..1."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1


def latent_mask(mask: np.ndarray[Any, Any]) -> Tensor:
    """A mask [128, 128] at the latents' size [16, 16]: the share of each place that the subject covers."""
    return torch.nn.functional.avg_pool2d(torch.from_numpy(mask).float()[None], 8)[0]


class Pictures(IterableDataset[Tensor]):
    """Pictures [3, H, W] in -1..1 from number `start` on, without end."""

    def __init__(self, start: int) -> None:
        """Start there."""
        self._start = start

    def __iter__(self) -> Iterator[Tensor]:
        number = self._start
        while True:
            yield to_tensor(paint(scene_of(number))[0])
            number += 1


def batches(pictures: Pictures, size: int) -> Iterator[Tensor]:
    """Batches [size, 3, H, W]."""
    return iter(DataLoader(pictures, batch_size=size))


def caption_of(number: int, draw: int) -> str:
    """What is said of picture `number` the `draw`-th time."""
    return caption(scene_of(number), random.Random(f"caption {number} {draw}"))
