"""Pairs of pictures that differ in their subject's shape alone, from which shapes are learnt: as words, by reference.

A thing's shape is decided in the first steps, where the picture is nearly all noise: there the noise's error hardly
counts it, and most of that error comes from elsewhere. So two shapes of one scene get the same noise, at these steps,
and what counts is the picture's error where they differ. The text-to-image model learns the words so. Only a model that
can be told of a shape can be told of one by MoMA's adapter, which learns it from such pairs too.
"""

import random
from dataclasses import replace

import torch
from torch import Tensor

from .world import MATERIALS, Scene, draw_scene, draw_subject, trained_places

_STEPS = (600, 985)
"""Of the 1000: those at which a shape is decided."""
_MOST_WEIGHT = 20.0
"""Of an error of the noise, as one of the picture."""
_ELSEWHERE, _MOST = 0.1, 10.0
"""Weight of errors where both pictures are the same, and the most where they are not; it is about 1 on average."""
_MATERIAL_SHARE = 0.4
_ENDS = (((0, 0), (1, 1)), ((0, 1), (1, 0)), ((0, 0), (1, 0)), ((0, 0), (0, 1)))


def shape_pair(rng: random.Random) -> tuple[Scene, Scene]:
    """A scene that training may see, with two shapes of its subject that are far from each other."""
    subject = draw_subject(rng)
    material = rng.choice(MATERIALS) if rng.random() < _MATERIAL_SHARE else None
    scene = draw_scene(rng, subject, rng.choice([None, *trained_places(subject.name)]), material)
    inwards = [rng.uniform(0, 0.25) for _ in subject.shape]
    first, second = (
        with_shape(scene, [abs(e - x) for e, x in zip(end, inwards, strict=True)]) for end in rng.choice(_ENDS)
    )
    return first, second


def with_shape(scene: Scene, shape: list[float] | tuple[float, float]) -> Scene:
    """The same scene, its subject with this shape."""
    return replace(scene, subject=replace(scene.subject, shape=(shape[0], shape[1])))


def pair_steps(pairs: int) -> Tensor:
    """Steps [2 x pairs] for rows that are pair after pair, the same for both of a pair."""
    return torch.randint(*_STEPS, (pairs,)).repeat_interleave(2)


def pair_noise(clean: Tensor) -> Tensor:
    """Noise for the latents of pair after pair [2P, 4, h, w], the same for both of a pair."""
    return torch.randn(len(clean) // 2, *clean.shape[1:]).repeat_interleave(2, dim=0).to(clean.device)


def pair_loss(errors: Tensor, clean: Tensor, shares: Tensor) -> Tensor:
    """The loss of pair after pair.

    Args:
        errors: Squared errors of the noise [2P, 4, h, w].
        clean: The latents that it was added to.
        shares: Of the signal's variance at each row's step [2P].
    """
    differ = (clean[::2] - clean[1::2]).square().mean(dim=1, keepdim=True)
    differ = (differ / differ.mean(dim=(2, 3), keepdim=True).clamp(min=1e-6)).clamp(max=_MOST)
    of_rows = (errors * (_ELSEWHERE + differ.repeat_interleave(2, dim=0))).mean(dim=(1, 2, 3))
    return (of_rows * ((1 - shares) / shares).clamp(max=_MOST_WEIGHT)).mean()
