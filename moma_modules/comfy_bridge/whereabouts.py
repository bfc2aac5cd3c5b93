"""Where in the picture a run is: everywhere, on a tile or crop whose place is known, or on one whose place is not.

Packs that cut a picture crop what a CONDITIONING holds along with it: areas, masks, `reference_latents`. SD1.5 looks at
no reference latents, so `mark_tokens` puts a map of the picture there. What such a pack hands on of it tells its place.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

MAP_KEY = "reference_latents"
_SIDE = 64
_SIGN = 4096.0
"""Third channel of the map, by which it is known again after resizing."""
_WHOLE = 0.01
"""A map that ends so close to the picture's border is that of the whole picture."""

Box = tuple[float, float, float, float]
"""Top, bottom, left and right of a crop, as fractions of the picture."""
PICTURE: Box = (0.0, 1.0, 0.0, 1.0)

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


def with_map(values: dict[str, Any]) -> dict[str, Any]:
    """A conditioning's values with the map of the whole picture among its reference latents."""
    return {**values, MAP_KEY: [*(item for item in values.get(MAP_KEY) or () if not _is_map(item)), picture_map()]}


def box_in(conds: list[dict[str, Any]]) -> Box | None:
    """The place that the first map in a run's conditionings tells; None if nobody has touched it, or without one."""
    maps = (item for cond in conds for item in cond.get(MAP_KEY) or () if _is_map(item) and item is not picture_map())
    found = next(maps, None)
    if found is None:
        return None
    (top, bottom), (left, right) = _ends(found[0, 0].mean(dim=1)), _ends(found[0, 1].mean(dim=0))
    whole = max(abs(top), abs(left), abs(bottom - 1), abs(right - 1)) < _WHOLE
    return PICTURE if whole else (top, bottom, left, right)


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


@cache
def picture_map() -> Tensor:
    """[1, 3, side, side]: height and width of each place as fractions, and the sign. One for all, never changed."""
    along = (torch.arange(_SIDE) + 0.5) / _SIDE
    return torch.stack(
        [along[:, None].expand(_SIDE, _SIDE), along.expand(_SIDE, _SIDE), torch.full((_SIDE,) * 2, _SIGN)]
    )[None]


def _is_map(item: Any) -> bool:
    if not isinstance(item, Tensor) or item.ndim != 4 or item.shape[1] != 3:
        return False
    return item.numel() > 0 and float((item[:, 2] - _SIGN).abs().max()) < 1.0


def _ends(values: Tensor) -> tuple[float, float]:
    """The ends of a line of pixels from the values at their middles; the outermost may have been repeated."""
    count = len(values)
    first, last = count // 4, count - 1 - count // 4
    if first == last:
        return float(values[0]), float(values[-1])
    step = float(values[last] - values[first]) / (last - first)
    middle = float(values[first] + values[last]) / 2
    return middle - step * count / 2, middle + step * count / 2


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
