"""Several runs within one execution of a node: whether one goes on with what the run before made, or is elsewhere.

Nodes that upscale by tiles, refine details or sample step by step start many runs. Only runs of one execution are
compared: what a node gives depends on its inputs alone, never on what happens to be remembered of other nodes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHARED = 0.05
"""A latent of which so many values are exactly those of the run before was made of its result."""

FIRST, GOES_ON, WHOLE, PART = "first", "goes on", "whole", "part"


@dataclass
class Trace:
    """A run, for those that follow in the same execution.

    Attributes:
        node: (prompt, node, index) that executes; None outside of ComfyUI's execution.
        given: The latent that the run started from [B, C, h, w] float16 on the CPU; None if it was empty.
        start, end: Noise levels.
        result: What it gave, like `given`.
        masks: {subject key: [B, h, w]}, its last ones.
        parts: Whether this or an earlier run of the execution was on another place than the one before it.
        said: What the user was told in this execution; outside of ComfyUI's, of the run before.
        told: What there was to tell of this run.
    """

    node: Any
    given: Tensor | None
    start: float
    end: float
    result: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    parts: bool = False
    said: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    @classmethod
    def begun(cls, node: Any, latent: Tensor, sigmas: Tensor) -> "Trace":
        """Of a run that is about to start."""
        given = None if latent.numel() == 0 or bool((latent == latent.flatten()[0]).all()) else _kept(latent)
        return cls(node, given, float(sigmas[0]), float(sigmas[-1]))

    def end_with(self, samples: Tensor, masks: dict[str, Tensor]) -> None:
        """Note what the run gave."""
        self.result, self.masks = _kept(samples), {key: mask.cpu() for key, mask in masks.items()}

    def after(self, before: "Trace | None") -> str:
        """How this run relates to the one before: FIRST, GOES_ON, WHOLE (the picture once more) or PART of one."""
        if before is None or before.node != self.node:
            return FIRST
        self.said, self.parts = before.said if self.node is not None else set(before.told), before.parts
        if self.given is None:
            return WHOLE
        if self._goes_on(before):
            return GOES_ON if self.node is not None else WHOLE
        if before.given is not None and torch.equal(before.given, self.given):
            return WHOLE
        if before.result is None or _is_larger(self.given, before.result):
            return WHOLE
        self.parts = True
        return PART

    def _goes_on(self, before: "Trace") -> bool:
        if self.given is None or before.result is None or self.given.shape != before.result.shape:
            return False
        if float((self.given == before.result).float().mean()) >= SHARED:
            return True
        return before.end > 0 and not before.parts and math.isclose(self.start, before.end, rel_tol=1e-4)


def _kept(latent: Tensor) -> Tensor:
    return latent.detach().to("cpu", torch.float16)


def _is_larger(latent: Tensor, before: Tensor) -> bool:
    """Whether it may be the other one upscaled: larger, and of the same shape up to rounding."""
    (high, wide), (old_high, old_wide) = latent.shape[-2:], before.shape[-2:]
    return high > old_high and wide > old_wide and abs(high * old_wide - wide * old_high) <= max(high, wide)
