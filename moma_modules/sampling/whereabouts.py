"""Where in the picture a run is, and how it relates to the run before in the same execution of a node.

A run is everywhere, on a tile or crop whose place is known, or on one whose place is not. Nodes that upscale by tiles,
refine details or sample step by step start many runs. Only runs of one execution are compared: what a node gives
depends on its inputs alone, never on what happens to be remembered of other nodes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

from ..prompt.marks import Box

TILES, CROPS = "tiles", "crops"
_KNOWN = {
    "BNK_TiledKSampler": TILES,
    "UltimateSDUpscale": TILES,
    "FaceDetailer": CROPS,
    "DetailerForEach": CROPS,
    "MaskDetailer": CROPS,
    "SEGSDetailer": CROPS,
}
"""How the names of nodes begin whose every run is on a part of the picture."""
_CROPPING = "UltimateSDUpscale"
"""How the names of those begin that crop maps too."""


def kind_of_node(class_type: str | None) -> str | None:
    """TILES or CROPS for a node that is known to work on parts of the picture."""
    return next((kind for name, kind in _KNOWN.items() if (class_type or "").startswith(name)), None)


def crops_maps(class_type: str | None) -> bool:
    """Whether a node crops the maps, so that a whole one tells that its run is on the whole picture."""
    return (class_type or "").startswith(_CROPPING)


@dataclass(frozen=True)
class Whereabouts:
    """What a run knows of its place.

    Attributes:
        kind: None for the whole picture, TILES (most of them without the subject) or CROPS (of things found).
        box: Where that is, if it is known.
        prompted: {subject key: [B, H, W] in 0..1}: where the prompts with the subject apply, if not everywhere.
    """

    kind: str | None = None
    box: Box | None = None
    prompted: dict[str, Tensor] = field(default_factory=dict)

    def is_out(self, part: Any, key: str) -> bool:
        """Whether a part of a subject (`ImageTokens`, `Shortcut`) cannot be placed, and so must stay out of the run."""
        if self.kind is None or key in self.prompted:
            return False
        return self.kind == TILES if part.window.region is None else self.box is None

    def area(self, part: Any, key: str, noise: Tensor) -> Tensor | None:
        """Where a part of a subject may act on the run's canvas [B, H, W]; None for everywhere."""
        area = self.prompted.get(key)
        if part is None or part.window.region is None or (self.kind is not None and self.box is None):
            return area  # on a tile at an unknown place a region of the picture means nothing; its prompt places it
        region = comfy.utils.repeat_to_batch_size(_on_canvas(part.window.region, self.box, noise), noise.shape[0])
        return region if area is None else area * region


def prompted_area(conds: list[dict[str, Any]], noise: Tensor) -> Tensor | None:
    """Where some processed conditionings apply [B, H, W]: their masks and areas together; None for everywhere."""
    if not conds or any("mask" not in cond and "area" not in cond for cond in conds):
        return None
    return torch.stack([_applies(cond, noise) for cond in conds]).amax(dim=0)


def _applies(cond: dict[str, Any], noise: Tensor) -> Tensor:
    shape = (noise.shape[0], *noise.shape[-2:])
    inside = torch.ones(shape, device=noise.device)
    if "area" in cond:
        high, wide, top, left = cond["area"]
        inside = torch.zeros_like(inside)
        inside[:, top : top + high, left : left + wide] = 1.0
    if "mask" in cond:
        mask = cond["mask"].to(noise.device, torch.float32).clamp(0, 1)
        inside = inside * comfy.utils.repeat_to_batch_size(mask, shape[0])
    return inside


def _on_canvas(region: Tensor, box: Box | None, noise: Tensor) -> Tensor:
    """A region of the picture [B, h, w], or what of it lies in a crop, in the size of the run's latent."""
    # On the CPU: Apple's GPUs resize by area only where the sizes are multiples of each other.
    region, size = region.to("cpu", torch.float32), tuple(noise.shape[-2:])
    if box is None:
        return interpolate(region[:, None], size=size, mode="area")[:, 0].to(noise.device)
    top, bottom, left, right = box
    fine = 4  # looked up at points closer than the latent's pixels, and averaged
    high, wide = (
        first + (torch.arange(count * fine) + 0.5) / (count * fine) * (last - first)
        for first, last, count in ((top, bottom, size[0]), (left, right, size[1]))
    )
    points = torch.stack(torch.meshgrid(high, wide, indexing="ij")[::-1], dim=-1) * 2 - 1
    points = points.expand(region.shape[0], -1, -1, -1)
    looked_up = grid_sample(region[:, None], points, mode="nearest", padding_mode="border", align_corners=False)
    return avg_pool2d(looked_up, fine)[:, 0].to(noise.device)


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
