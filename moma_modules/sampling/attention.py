"""Replacements for the UNet's attention calls. They hold no settings and no state: both come with each forward."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any
from uuid import uuid4

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from .settings import KEY

FORWARD = "moma_forward"
"""Key of the current `Forward` in the transformer options."""

LOST = (
    "MoMA: another node took MoMA's wrappers off this model, or runs the model by itself, so that MoMA would do "
    "nothing. BrushNet and PowerPaint replace the wrappers of the nodes before them: apply MoMA's nodes after such a "
    "node, or remove it."
)
"""The message where our patches are left and nothing else of ours is."""


class AttentionPatch(ABC):
    """One entry of `patches_replace`: what sat in the slot before, plus MoMA, plus what others add.

    `add` is the protocol by which the IPAdapter family shares a cross-attention slot.

    Attributes:
        origin: The same for all copies of a patch, deep ones too.
    """

    def __init__(self, block: int, previous: Any = None) -> None:
        self.block = block
        self.previous = previous
        self.origin = uuid4().hex
        self.added: list[tuple[Callable[..., Tensor], dict[str, Any]]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q [R, T, C], k and v [R, L, C] after projection; returns [R, T, C] before `to_out`."""
        if self.previous is not None:
            # It may be another node's, around one of ours: the features are to be added once, here.
            out = self.previous(q, k, v, {**extra_options, FORWARD: None})
        else:
            out = plain_attention(q, k, v, extra_options)
        forward = extra_options.get(FORWARD)
        if KEY not in extra_options:
            raise ValueError(LOST)
        if forward is not None:
            out = self.add_subjects(out, q, k, forward, extra_options)
        for callback, kwargs in self.added:
            if _within(extra_options, kwargs):
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out

    @abstractmethod
    def add_subjects(self, out: Tensor, q: Tensor, k: Tensor, forward: Any, extra_options: dict[str, Any]) -> Tensor:
        """Add what MoMA contributes to this layer."""

    def add(self, callback: Callable[..., Tensor], **kwargs: Any) -> None:
        """Add `callback(out, q, k, v, extra_options, **kwargs)` to this layer's output.

        `sigma_start` and `sigma_end` among the kwargs limit it to that range, as IPAdapter's own patch does.
        """
        self.added.append((callback, kwargs))

    def copy(self) -> "AttentionPatch":
        """A patch of its own for a clone of the model, so that `add` on the clone leaves the original alone."""
        other = copy(self)
        other.added = list(self.added)
        return other

    def to(self, device_or_dtype: Any) -> "AttentionPatch":
        """ComfyUI moves patches before sampling; here only what was in the slot before may need it."""
        if hasattr(self.previous, "to"):
            self.previous = self.previous.to(device_or_dtype)
        return self

    def models(self) -> list[Any]:
        """Models that ComfyUI must load for what was in the slot before."""
        return self.previous.models() if hasattr(self.previous, "models") else []

    def cleanup(self) -> None:
        """ComfyUI calls this after sampling."""
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()


class SelfAttentionPatch(AttentionPatch):
    """Adds attention to the reference's keys and values."""

    def add_subjects(self, out: Tensor, q: Tensor, k: Tensor, forward: Any, extra_options: dict[str, Any]) -> Tensor:
        """See `AttentionPatch.add_subjects`."""
        if not forward.reaches_all(self.block, q, extra_options):
            return out
        return forward.add_shortcuts(out, q, self.block, extra_options)


class CrossAttentionPatch(AttentionPatch):
    """Adds attention to the image tokens and collects where the subject's text tokens are attended to."""

    def add_subjects(self, out: Tensor, q: Tensor, k: Tensor, forward: Any, extra_options: dict[str, Any]) -> Tensor:
        """See `AttentionPatch.add_subjects`."""
        forward.collect_map(q, k, self.block, extra_options)
        return forward.add_image_tokens(out, q, self.block, extra_options)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """What the UNet itself would compute, with ComfyUI's chosen attention."""
    return optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
    )


def attend_shared(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """Attention of all rows of q [R, T, C] to the same keys and values [1, N, C]."""
    return plain_attention(q.reshape(1, -1, q.shape[2]), k, v, extra_options).view(q.shape)


def _within(extra_options: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    if "sigma_start" not in kwargs or "sigmas" not in extra_options:
        return True
    sigma = float(torch.max(extra_options["sigmas"]))
    return kwargs["sigma_end"] <= sigma <= kwargs["sigma_start"]
