"""What a CONDITIONING of ours carries: where subjects' tokens are in its text, and a map of the picture.

Packs that cut a picture crop what a CONDITIONING holds along with it: areas, masks, `reference_latents`. SD1.5 looks at
no reference latents, so `mark_tokens` puts a map of the picture there. What such a pack hands on of it tells its place.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

TOKENS_KEY = "moma_subject_tokens"
"""Entry of a CONDITIONING: {subject key: flat positions of the subject's tokens}."""


def mark_tokens(conditioning: list, positions: dict[str, tuple[int, ...]]) -> list:
    """A copy of a CONDITIONING that knows the positions of subjects' tokens, by subject key, and carries a map."""
    return [
        [text, with_map({**values, TOKENS_KEY: {**values.get(TOKENS_KEY, {}), **positions}})]
        for text, values in conditioning
    ]


def moved_tokens(conditioning: list, key: str, starts: list[int]) -> list:
    """A copy of a marked CONDITIONING in which the text of each part begins at the token `starts` says."""
    moved = []
    for (values, known), start in zip(conditioning, starts, strict=True):
        places = {**known[TOKENS_KEY], key: tuple(place + start for place in known[TOKENS_KEY][key])}
        moved.append([values, {**known, TOKENS_KEY: places}])
    return moved


MAP_KEY = "reference_latents"
_SIDE = 64
_SIGN = 4096.0
"""Third channel of the map, by which it is known again after resizing."""
_WHOLE = 0.01
"""A map that ends so close to the picture's border is that of the whole picture."""

Box = tuple[float, float, float, float]
"""Top, bottom, left and right of a crop, as fractions of the picture."""
PICTURE: Box = (0.0, 1.0, 0.0, 1.0)


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
