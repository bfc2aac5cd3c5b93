"""One UNet forward: what MoMA adds to its layers, and the attention maps it collects."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..subject_mask import layer_map, token_attention
from .attention import attend_shared, plain_attention
from .conditioning import Rows
from .settings import SubjectSettings


@dataclass(frozen=True)
class SubjectRun:
    """One subject in one run: settings made concrete on the device.

    Attributes:
        image_tokens: Per block the keys and values of the image tokens [2, 4, C], negative then positive.
        reference: Per block the keys and values of the reference [1, N, C].
        cross_area, self_area: [B, H, W] where each part may act (region masks), or None for everywhere.
    """

    settings: SubjectSettings
    image_tokens: dict[int, tuple[Tensor, Tensor]]
    reference: dict[int, tuple[Tensor, Tensor]]
    cross_area: Tensor | None
    self_area: Tensor | None


@dataclass
class Forward:
    """Lives for one forward of the UNet, in the transformer options.

    Attributes:
        subjects: The subjects of the run.
        rows: What is known of this forward's rows.
        cross_factors, self_factors: Per subject [B, H, W] = area x subject mask x schedule x weight; None: off.
        size: Latent height and width of this forward (of a crop, for area conditioning).
        map_sum: [R, S, h, w], sum over the layers' maps so far; None if maps are not wanted.
        map_count: Layers summed.
    """

    subjects: tuple[SubjectRun, ...]
    rows: Rows
    cross_factors: tuple[Tensor | None, ...]
    self_factors: tuple[Tensor | None, ...]
    size: tuple[int, int]
    map_sum: Tensor | None = None
    map_count: int = 0
    _resized: dict[tuple[int, tuple[int, int]], Tensor] = field(default_factory=dict)

    def collect_map(self, q: Tensor, k: Tensor, extra_options: dict[str, Any]) -> None:
        """Add this layer's attention to the subjects' text tokens to the sum."""
        if self.map_sum is None:
            return
        layer_size = self._layer_size(q, extra_options)
        attention = token_attention(q, k, _fit_length(self.rows.tokens, k.shape[1]), extra_options["n_heads"])
        self.map_sum += layer_map(attention, layer_size, self.size)
        self.map_count += 1

    def add_image_tokens(self, out: Tensor, q: Tensor, block: int, extra_options: dict[str, Any]) -> Tensor:
        """`out + weight * M * A(q, K_image, V_image)` for every subject."""
        for subject, factor in zip(self.subjects, self.cross_factors, strict=True):
            if factor is not None:
                k, v = (both.to(q.dtype)[self.rows.positive] for both in subject.image_tokens[block])
                out = out + self._at_layer(factor, q, extra_options) * plain_attention(q, k, v, extra_options)
        return out

    def add_shortcuts(self, out: Tensor, q: Tensor, block: int, extra_options: dict[str, Any]) -> Tensor:
        """`out + strength * scale * M * A(q, K_reference, V_reference)` for every subject."""
        for subject, factor in zip(self.subjects, self.self_factors, strict=True):
            if factor is not None and block in subject.reference:
                k, v = (part.to(q.dtype) for part in subject.reference[block])
                scale = subject.settings.adapter.scales[block]
                delta = attend_shared(q, k, v, extra_options)
                out = out + self._at_layer(factor, q, extra_options) * scale * delta
        return out

    def _at_layer(self, factor: Tensor, q: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """A factor [B, H, W] for this forward's rows at a layer's size: [R, T, 1]."""
        layer_size = self._layer_size(q, extra_options)
        key = (id(factor), layer_size)
        if key not in self._resized:
            rows = factor.flatten()[self.rows.pixels]
            self._resized[key] = interpolate(rows, size=layer_size, mode="nearest").flatten(1)[..., None].to(q.dtype)
        return self._resized[key]

    def _layer_size(self, q: Tensor, extra_options: dict[str, Any]) -> tuple[int, int]:
        height, width = extra_options["activations_shape"][-2:]
        rows = self.rows.pixels.shape[0]
        if q.shape[0] != rows or q.shape[1] != height * width:
            raise ValueError(
                f"MoMA: another node changed the attention's input to {q.shape[0]} rows of {q.shape[1]} tokens, where "
                f"{rows} rows of {height}x{width} were expected. HyperTile, Token Merging and regional-attention nodes "
                "do that; remove them from this model."
            )
        return height, width


def _fit_length(tokens: Tensor, length: int) -> Tensor:
    """Token rows for the text length of this forward: a prefix of the repeated rows, or zeros for what others added."""
    if tokens.shape[2] >= length:
        return tokens[:, :, :length]
    return torch.nn.functional.pad(tokens, (0, length - tokens.shape[2]))
