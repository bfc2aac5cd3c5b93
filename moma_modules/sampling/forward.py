"""One UNet forward: what MoMA adds to its layers, and the attention maps it collects."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .attention import attend_shared, plain_attention
from .features import SubjectRun, image_tokens_of_rows
from .rows import Rows
from .subject_mask import layer_maps, token_attention, token_values
from .unet import BLOCKS

ORDER = tuple(sorted(range(len(BLOCKS)), key=lambda block: ("input", "middle", "output").index(BLOCKS[block][0])))
"""The blocks in the order in which the UNet comes to them."""


@dataclass
class Passes:
    """The passes of the UNet over one input. There may be several; the first that is complete counts.

    Attributes:
        started: Whether the UNet was asked to run at all; a cache may answer in its place.
    """

    started: bool = False
    _cross: list[int] = field(default_factory=list)
    _whole: list[int] = field(default_factory=list)
    _parts: list[int] = field(default_factory=list)
    _over: bool = False

    @property
    def complete(self) -> bool:
        """Whether one came to every cross-attention layer once, in order."""
        return tuple(self._cross) == ORDER

    @property
    def own_complete(self) -> bool:
        """Whether every self-attention layer was come to with all rows, where there are patches for them."""
        return set(self._whole) == set(ORDER)

    @property
    def touched(self) -> bool:
        """Whether any cross-attention layer was come to."""
        return bool(self._cross)

    def start(self) -> bool:
        """The UNet starts; returns whether what earlier passes collected is to be forgotten."""
        self.started = True
        self._over = self.complete
        if not self._over:
            self._cross, self._whole, self._parts = [], [], []
        return not self._over

    def cross(self, block: int) -> bool:
        """A cross-attention layer is come to; returns whether its map counts.

        Raises:
            ValueError: The UNet has started again, and nobody said so.
        """
        if self._over:
            return False
        if self._cross and ORDER.index(block) < ORDER.index(self._cross[-1]):
            raise ValueError(
                "MoMA: another node runs the UNet more than once for one evaluation, in a way that does not show which "
                "of the runs makes the picture. Remove that node, or MoMA."
            )
        self._cross.append(block)
        return True

    def own(self, block: int, part: bool) -> None:
        """A self-attention layer is come to, with all rows or with a part of them."""
        (self._parts if part else self._whole).append(block)

    def finish(self) -> None:
        """The UNet has run.

        Raises:
            ValueError: A self-attention layer was computed in parts only, so that no row got the features.
        """
        missed = [block for block in self._parts if block not in self._whole]
        if missed:
            name, number = BLOCKS[missed[0]]
            raise ValueError(
                f"MoMA: another node computes the self-attention of {name} block {number} for some rows of a batch at "
                "a time, and MoMA must know which rows these are. Remove that node, or Self-Attn Shortcut."
            )


Size = tuple[int, int]
Part = tuple[str, int]
"""Which factor: "cross" or "self", and the subject's number."""


@dataclass
class Forward:
    """Lives for one forward of the UNet, in the transformer options.

    The UNet may run several times over the same input within it; the first pass that is complete gives the map.

    Attributes:
        x: The latents [R, C, h, w] that it is to go over; `unet_input` is what the UNet is given for them.
        subjects: The subjects of the run.
        rows: What is known of this forward's rows.
        cross_factors, self_factors: Per subject [B, H, W] = area x subject mask x schedule x weight (or strength);
            None: off.
        collecting: Whether attention maps are wanted.
        sparse_shortcut: Whether the shortcut is computed only where its factor is not 0. Finding these places makes the
            host wait for the device: worth it on a CPU, where the device is the host, if the forward is not compiled.
        others_on_model: Who else is on the model, for messages.
        passes: What of the UNet it came to.
    """

    x: Tensor
    subjects: tuple[SubjectRun, ...]
    rows: Rows
    cross_factors: tuple[Tensor | None, ...]
    self_factors: tuple[Tensor | None, ...]
    collecting: bool = False
    sparse_shortcut: bool = False
    others_on_model: str = ""
    unet_input: Tensor | None = None
    passes: Passes = field(default_factory=Passes)
    _attention: dict[Size, list[Tensor]] = field(default_factory=dict)
    _token_values: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _image_tokens: dict[int, Tensor] = field(default_factory=dict)
    _row_factors: dict[Part, Tensor] = field(default_factory=dict)
    _layer_factors: dict[tuple[Part, Size], Tensor] = field(default_factory=dict)
    _places: dict[tuple[Part, Size], Tensor] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """Latent height and width (of a crop, for area conditioning)."""
        return (self.x.shape[-2], self.x.shape[-1])

    def start_pass(self) -> None:
        """The UNet starts to run over our input."""
        if self.passes.start():
            self._attention.clear()

    def reaches_all(self, block: int, q: Tensor, extra_options: dict[str, Any]) -> bool:
        """Whether this call of a self-attention layer is that of all rows.

        Another node may compute some of them in another way besides; that is its own affair.
        """
        height, width = extra_options["activations_shape"][-2:]
        part = q.shape[0] < self.rows.pixels.shape[0] and q.shape[1] == height * width
        self.passes.own(block, part)
        return not part

    def collect_map(self, q: Tensor, k: Tensor, block: int, extra_options: dict[str, Any]) -> None:
        """Note this layer's attention to the subjects' text tokens."""
        counts = self.passes.cross(block)
        if counts and self.collecting:
            size = self._layer_size(q, extra_options)
            values = self._values(q, k, extra_options["n_heads"])
            attention = token_attention(q, k, values, len(self.subjects))
            self._attention.setdefault(size, []).append(attention)

    def mean_map(self) -> Tensor | None:
        """Mean over the layers' maps [R, S, h, w] in 0..1; None if there are not those of all layers."""
        if not self._attention or not self.passes.complete:
            return None
        sums = [layer_maps(layers, size, self.size) for size, layers in self._attention.items()]
        return torch.stack(sums).sum(dim=0) / sum(map(len, self._attention.values()))

    def add_image_tokens(self, out: Tensor, q: Tensor, block: int, extra_options: dict[str, Any]) -> Tensor:
        """`out + factor * A(q, K_image, V_image)` for every subject."""
        for i, (subject, factor) in enumerate(zip(self.subjects, self.cross_factors, strict=True)):
            tokens, layers = subject.settings.image_tokens, subject.image_tokens
            if factor is not None and tokens is not None and layers is not None:
                if i not in self._image_tokens:
                    self._image_tokens[i] = image_tokens_of_rows(layers, self.rows.positive, q.dtype)
                k, v = layers.keys_values(self._image_tokens[i], block)
                delta = plain_attention(q, k, v, extra_options)
                at_layer = self._at_layer(("cross", i), factor, self._layer_size(q, extra_options), q.dtype)
                out = torch.addcmul(out, at_layer, delta)
        return out

    def add_shortcuts(self, out: Tensor, q: Tensor, block: int, extra_options: dict[str, Any]) -> Tensor:
        """`out + scale * factor * A(q, K_reference, V_reference)` for every subject; the scale is the block's."""
        for i, (subject, factor) in enumerate(zip(self.subjects, self.self_factors, strict=True)):
            shortcut = subject.settings.shortcut
            if factor is not None and shortcut is not None and block in subject.reference:
                size = self._layer_size(q, extra_options)
                at_layer = self._at_layer(("self", i), factor, size, q.dtype)
                places = self._places_of(("self", i), size, at_layer) if self.sparse_shortcut else None
                k, v = (part.to(q.dtype) for part in subject.reference[block])
                scale = subject.settings.adapter.scales[block]
                if places is None:
                    out = torch.addcmul(out, at_layer, attend_shared(q, k, v, extra_options), value=scale)
                elif len(places):
                    delta = attend_shared(q.flatten(0, 1)[places][None], k, v, extra_options)[0]
                    delta = delta * at_layer.flatten()[places, None]
                    out = out.flatten(0, 1).index_add(0, places, delta, alpha=scale).view_as(out)
        return out

    def _at_layer(self, part: Part, factor: Tensor, size: Size, dtype: torch.dtype) -> Tensor:
        """A factor [B, H, W] for this forward's rows at a layer's size: [R, T, 1]."""
        if (part, size) not in self._layer_factors:
            if part not in self._row_factors:
                self._row_factors[part] = factor.flatten()[self.rows.pixels]
            resized = interpolate(self._row_factors[part], size=size, mode="nearest")
            self._layer_factors[part, size] = resized.to(dtype).flatten(1)[..., None]
        return self._layer_factors[part, size]

    def _places_of(self, part: Part, size: Size, at_layer: Tensor) -> Tensor:
        """Places in the flattened rows and tokens where a factor is not 0."""
        if (part, size) not in self._places:
            self._places[part, size] = at_layer.flatten().nonzero().flatten()
        return self._places[part, size]

    def _values(self, q: Tensor, k: Tensor, heads: int) -> Tensor:
        head_size, length = q.shape[2] // heads, k.shape[1]
        key = (head_size, length)
        if key not in self._token_values:
            tokens = _fit_length(self.rows.tokens, length)
            self._token_values[key] = token_values(tokens, heads, head_size, q.dtype)
        return self._token_values[key]

    def _layer_size(self, q: Tensor, extra_options: dict[str, Any]) -> Size:
        height, width = extra_options["activations_shape"][-2:]
        rows = self.rows.pixels.shape[0]
        if q.shape[0] != rows or q.shape[1] != height * width:
            raise ValueError(
                f"MoMA: another node changed the attention's input to {q.shape[0]} rows of {q.shape[1]} tokens, where "
                f"{rows} rows of {height}x{width} were expected. HyperTile, Token Merging and regional-attention nodes "
                f"do that; remove them from this model.{self.others_on_model}"
            )
        return height, width


def _fit_length(tokens: Tensor, length: int) -> Tensor:
    """Token rows for the text length of this forward: a prefix of the repeated rows, or zeros for what others added."""
    if tokens.shape[2] >= length:
        return tokens[:, :, :length]
    return pad(tokens, (0, length - tokens.shape[2]))
