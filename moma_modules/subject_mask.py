"""The automatic subject mask: where the subject's text tokens are attended to (SPEC, "Subject mask")."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

THRESHOLD = 0.2


def token_attention(q: Tensor, k: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """Attention probability that falls on chosen text tokens, mean over heads.

    Args:
        q: Queries [R, T, heads * d].
        k: Text keys [R, L, heads * d].
        tokens: Weight of each text token for each subject [R, S, L], 0 or 1.

    Returns:
        [R, S, T] float32, in 0..1 where tokens do not repeat.
    """
    rows, count, width = q.shape
    queries = q.view(rows, count, heads, width // heads).transpose(1, 2)
    keys = k.view(rows, k.shape[1], heads, width // heads).transpose(1, 2)
    scores = (queries @ keys.transpose(-1, -2)).float() * (width // heads) ** -0.5
    chosen = scores.softmax(dim=-1) @ tokens.float().transpose(1, 2).unsqueeze(1)
    return chosen.mean(dim=1).transpose(1, 2)


def min_max(values: Tensor) -> Tensor:
    """Scale the last dimension to 0..1; a constant one becomes 0."""
    low = values.amin(dim=-1, keepdim=True)
    span = values.amax(dim=-1, keepdim=True) - low
    return (values - low) / torch.where(span > 0, span, 1.0)


def layer_map(attention: Tensor, layer_size: tuple[int, int], latent_size: tuple[int, int]) -> Tensor:
    """One layer's contribution: min-max normalised per row, then resized nearest.

    Args:
        attention: [R, S, h * w] of a layer.

    Returns:
        [R, S, H, W] in 0..1 at latent size.
    """
    rows, subjects, _ = attention.shape
    return interpolate(min_max(attention).view(rows, subjects, *layer_size), size=latent_size, mode="nearest")


def subject_mask(maps: Tensor, covered: Tensor) -> Tensor:
    """The mask of one evaluation from the maps of its negative and positive rows.

    Both halves of an image are normalised together, values up to `THRESHOLD` are dropped, and the rest is normalised
    again. Where nothing stands out at all (a constant map) the mask is 1: no mask.

    Args:
        maps: [..., 2, N], negative then positive, mean over layers.
        covered: Same shape, bool: where a row contributed. Others neither count nor get a value.

    Returns:
        The positive half [..., N] in 0..1, 0 where not covered.
    """
    shape = maps.shape
    values = maps.flatten(-2)
    inside = covered.flatten(-2)
    scaled, varies = _covered_min_max(values, inside)
    scaled, _ = _covered_min_max(torch.where(scaled > THRESHOLD, scaled, 0.0), inside)
    return torch.where(varies, scaled, 1.0).view(shape)[..., 1, :]


def _covered_min_max(values: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.where(covered, values, torch.inf).amin(dim=-1, keepdim=True)
    span = torch.where(covered, values, -torch.inf).amax(dim=-1, keepdim=True) - low
    varies = span > 0  # also false where nothing is covered: the span is -inf then
    scaled = (values - low) / torch.where(varies, span, 1.0)
    return torch.where(covered & varies, scaled, 0.0), varies
