"""The keys and values of a kept beginning as transformers' attention layers ask for them."""

from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from transformers import Cache

from .beginnings import Layers


class KeyValues(Cache):
    """Hands each layer the keys and values of the beginning with its own, and notes its own first ones.

    transformers hands it to every layer and calls `update`. Nothing else of it is used: who gives a mask and positions
    is not asked how long the past is. So it fits every version, though their own caches differ.
    """

    def __init__(self, past: Layers, length: int, keep: int) -> None:
        """Go on after `length` tokens of `past`; with `keep`, `kept` will hold that many of the forward's own.

        Args:
            past: Of every layer, on any device; none for a forward from the start.
        """
        self.layers: list[Any] = []  # transformers' own kind of layer, of which there is none
        self.past, self.length, self.keep = past, length, keep
        self.kept: Layers = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer attends to, where it has computed these."""
        keys, values = key_states, value_states
        if self.keep:
            self.kept.append((keys[:, :, : self.keep].clone(), values[:, :, : self.keep].clone()))
        if not self.length:
            return keys, values
        before = (
            comfy.model_management.cast_to_device(part[:, :, : self.length], keys.device, None)  # does not wait
            for part in self.past[layer_idx]
        )
        joined = [torch.cat(parts, dim=2) for parts in zip(before, (keys, values), strict=True)]
        return joined[0], joined[1]

    def get_seq_length(self, *_: Any) -> int:
        """How many tokens were before this forward."""
        return self.length
