"""What can be seen of a subject mask while it evolves: a live picture, and a film of the run. Both only look."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..host.messages import show_mask, someone_looks

INTERVAL = 0.4
"""Seconds between two live pictures at least: each makes the CPU wait for the device, as nothing else in a step."""
FRAMES = 8

Frame = tuple[int, Tensor]
"""The number of an evaluation, from 1, and the masks [S, B, H, W] uint8 that it ended with."""


@dataclass
class LiveMask:
    """Shows one subject's mask on a node while the sampler runs."""

    node_id: str
    _next: float = 0.0

    def show(self, mask: Tensor) -> None:
        """Show a mask [B, h, w] in 0..1, unless it is too soon or nobody looks."""
        now = time.monotonic()
        if now >= self._next and someone_looks():
            self._next = now + INTERVAL
            show_mask(mask, self.node_id)


@dataclass
class Film:
    """A few masks of a run, evenly spread over its evaluations however many there are. They stay on the device."""

    frames: list[Frame] = field(default_factory=list)
    count: int = 0
    _stride: int = 1

    def add(self, masks: Tensor) -> None:
        """Add the masks [S, B, H, W] in 0..1 of the next evaluation."""
        self.count += 1
        if (self.count - 1) % self._stride:
            return
        self.frames.append((self.count, (masks * 255).to(torch.uint8)))
        if len(self.frames) == FRAMES:
            self.frames = self.frames[::2]
            self._stride *= 2
