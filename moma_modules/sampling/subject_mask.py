"""The automatic subject mask: where the subject's text tokens are attended to (arXiv 2404.05674, and its code)."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from .rows import Rows

THRESHOLD = 0.2


def token_values(tokens: Tensor, heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    """Attention values that stand for the subjects: 1 at a subject's tokens, in the column of that subject.

    Args:
        tokens: Weight of each text token for each subject [R, S, L], 0 or 1.

    Returns:
        [R, heads, L, head_size], wider if there are more subjects than that.
    """
    columns = tokens.transpose(1, 2).to(dtype)
    padded = pad(columns, (0, max(head_size - columns.shape[2], 0)))
    return padded[:, None].expand(-1, heads, -1, -1).contiguous()


def token_attention(q: Tensor, k: Tensor, values: Tensor, subjects: int) -> Tensor:
    """Attention probability that falls on the subjects' text tokens, mean over heads.

    Attention to `token_values` sums exactly these probabilities, in a fused kernel that never stores the others.

    Args:
        q: Queries [R, T, heads * head_size].
        k: Text keys [R, L, heads * head_size].
        values: From `token_values`.
        subjects: S.

    Returns:
        [R, T, S] in 0..1 where tokens do not repeat.
    """
    heads = values.shape[1]
    queries, keys = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return scaled_dot_product_attention(queries, keys, values)[..., :subjects].mean(dim=1)


def min_max(values: Tensor, dim: int) -> Tensor:
    """Scale a dimension to 0..1; a constant one becomes 0."""
    low, high = torch.aminmax(values, dim=dim, keepdim=True)
    span = high - low
    return (values - low) / torch.where(span > 0, span, 1.0)


def layer_maps(attention: list[Tensor], layer_size: tuple[int, int], latent_size: tuple[int, int]) -> Tensor:
    """What layers of one size contribute together: each min-max normalised per row, summed, resized nearest.

    Args:
        attention: Per layer [R, h * w, S], see `token_attention`.

    Returns:
        [R, S, H, W] float32 in 0..len(attention) at latent size.
    """
    total = min_max(torch.stack(attention).float(), dim=2).sum(dim=0)
    return interpolate(total.transpose(1, 2).unflatten(2, layer_size), size=latent_size, mode="nearest")


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


class EvaluationMaps:
    """Attention maps of one evaluation, gathered on a canvas [S, 2, B * H * W] (negative, positive).

    `cut_short`: a forward came to some layers only (caches of the first block do that), so there are no masks.

    Guidance nodes (SAG) may evaluate a changed latent again with the same options: the first call to reach a place on
    the canvas counts.
    """

    def __init__(self, subjects: int, canvas: tuple[int, int, int], device: torch.device) -> None:
        self.canvas = canvas
        self.sums = torch.zeros(subjects, 2, canvas[0] * canvas[1] * canvas[2], device=device)
        self.counts = torch.zeros_like(self.sums)
        self.has_maps = False
        self.cut_short = False
        self._call_sums = torch.zeros_like(self.sums)
        self._call_counts = torch.zeros_like(self.sums)

    def add(self, maps: Tensor, rows: Rows) -> None:
        """Put the maps [R, S, h, w] of a forward's rows in their places."""
        known = rows.tokens.amax(dim=2).to(maps.dtype)[..., None, None].expand_as(maps)
        places = (rows.positive.view(-1, 1, 1, 1) * self.sums.shape[2] + rows.pixels).flatten()
        for canvas, values in ((self._call_sums, maps * known), (self._call_counts, known)):
            canvas.view(canvas.shape[0], -1).index_add_(1, places, values.transpose(0, 1).flatten(1))
        self.has_maps = True

    def end_call(self) -> None:
        """Keep what the call added where nothing was yet."""
        new = self.counts == 0
        self.sums += torch.where(new, self._call_sums, 0.0)
        self.counts += torch.where(new, self._call_counts, 0.0)
        self._call_sums.zero_()
        self._call_counts.zero_()

    def masks(self, previous: Tensor | None) -> Tensor:
        """[S, B, H, W]; where no positive row knew a subject of an image (timestep ranges), its mask stays."""
        subjects, (batch, height, width) = self.sums.shape[0], self.canvas
        by_image = (subjects, 2, batch, height * width)
        maps = (self.sums / self.counts.clamp(min=1)).view(by_image).transpose(1, 2)
        covered = (self.counts > 0).view(by_image).transpose(1, 2)
        found = subject_mask(maps, covered)
        before = torch.ones_like(found) if previous is None else previous.view_as(found)
        known = covered[:, :, 1].any(dim=-1, keepdim=True)
        return torch.where(known, found, before).view(subjects, batch, height, width)
