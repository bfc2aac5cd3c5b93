"""What each row of a forward must know, carried by ComfyUI's own conditioning so that every batching keeps it.

ComfyUI splits, joins, crops and re-orders conditionings on the way to the UNet. Values in `model_conds` go through all
of that with their row: no patch has to guess which row is whose.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy.conds import CONDNoiseShape, CONDRegular
from torch import Tensor

from ..prompt.marks import TOKENS_KEY

_TOKENS, _POSITIVE, _PIXELS = "moma_tokens", "moma_positive", "moma_pixels"


@dataclass(frozen=True)
class Rows:
    """What is known of the R rows of one forward.

    Attributes:
        tokens: [R, S, L]: 1 at the text tokens of subject s. L is a multiple of the row's own text length.
        positive: [R] int64: 1 for rows of a positive prompt, 0 for negative ones.
        pixels: [R, 1, h, w] int64: index of each latent pixel in the run's flattened [B, H, W] canvas.
    """

    tokens: Tensor
    positive: Tensor
    pixels: Tensor


def positives_of(conds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All but the negative conditionings of a run."""
    return [cond for name, part in conds.items() if not _is_negative(name) for cond in part or ()]


def subjects_in(conds: dict[str, list[dict[str, Any]]], keys: list[str]) -> list[bool]:
    """For each subject key whether some positive conditioning knows its tokens."""
    positives = positives_of(conds)
    return [any(cond.get(TOKENS_KEY, {}).get(key) for cond in positives) for key in keys]


def attach_rows(conds: dict[str, list[dict[str, Any]]], keys: list[str], noise: Tensor) -> None:
    """Add the rows' data to a run's own processed conditionings (`guider.conds`).

    Every conditioning gets every entry in the same shape, so that positive and negative still run as one batch.
    Negative prompts look at the positions of the positive prompt's tokens, as MoMA does.
    """
    batch, _, height, width = noise.shape
    pixels = torch.arange(batch * height * width, device=noise.device).view(batch, 1, height, width)
    everything = [(name, cond) for name, part in conds.items() for cond in part or ()]
    length = math.lcm(*(_text_length(cond) for _, cond in everything))
    fallback = _first_positions(conds, keys)
    for name, cond in everything:
        negative = _is_negative(name)
        own = cond.get(TOKENS_KEY, {})
        positions = [own.get(key) or (fallback[i] if negative else ()) for i, key in enumerate(keys)]
        cond["model_conds"] = {
            **cond["model_conds"],
            _TOKENS: CONDRegular(_token_rows(positions, _text_length(cond), length).to(noise.device)),
            _POSITIVE: CONDRegular(torch.tensor([0 if negative else 1], device=noise.device)),
            _PIXELS: CONDNoiseShape(pixels),
        }


def take_rows(forward_kwargs: dict[str, Any]) -> Rows | None:
    """Remove our entries from the arguments of a forward; None if this forward has none."""
    values = [forward_kwargs.pop(key, None) for key in (_TOKENS, _POSITIVE, _PIXELS)]
    return None if any(value is None for value in values) else Rows(*values)


def _is_negative(name: str) -> bool:
    """Guiders name their conditionings; those of negative prompts say so ("negative", "empty_negative_prompt")."""
    return "negative" in name


def _first_positions(conds: dict[str, list[dict[str, Any]]], keys: list[str]) -> list[tuple[int, ...]]:
    positives = positives_of(conds)
    return [next((c[TOKENS_KEY][key] for c in positives if c.get(TOKENS_KEY, {}).get(key)), ()) for key in keys]


def _text_length(cond: dict[str, Any]) -> int:
    text = cond["model_conds"].get("c_crossattn")
    return 1 if text is None else text.cond.shape[1]


def _token_rows(positions: list[tuple[int, ...]], own_length: int, length: int) -> Tensor:
    """[1, S, length]; ComfyUI repeats shorter prompts to the common length of a batch, and so do these."""
    rows = torch.zeros(1, len(positions), own_length)
    for i, places in enumerate(positions):
        rows[0, i, [p for p in places if p < own_length]] = 1.0
    return rows.repeat(1, 1, length // own_length)
