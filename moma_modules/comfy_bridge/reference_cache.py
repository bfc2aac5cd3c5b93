"""Keys and values of reference passes, kept from run to run while nothing that they depend on has changed."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .kept import Kept

CAPACITY = 256 * 2**20
"""Bytes of CPU memory per loaded adapter. One reference at 25 % mask takes 11 MB in 16 bit."""

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Block index to keys and values [1, N, C] of the N reference tokens that lie on the subject."""


@dataclass(frozen=True)
class ReferenceKey:
    """What the result of a subject's reference passes depends on, the model object aside.

    Attributes:
        content: Hash of latents, noise, text and masks, see `content_hash`.
        weights: The MODEL's `patches_uuid`, which is another one whenever a LoRA or merge changes its weights.
        sigma: Noise level of timestep 0.
        dtype: What the UNet computes in.
        extra_channels: Of the UNet's input, beside those of the latent.
    """

    content: str
    weights: Any
    sigma: float
    dtype: torch.dtype
    extra_channels: int


def _size(value: KeysValues) -> int:
    return sum(tensor.nbytes for pair in value.values() for tensor in pair)


@dataclass
class ReferenceCache:
    """Belongs to a loaded adapter and goes with it.

    `parts` are what else a result depends on and is itself only while it is the same object: object patches, LoRA
    injections, the chosen attention function. None of them is None.
    """

    kept: Kept[KeysValues] = field(default_factory=lambda: Kept(_size, CAPACITY))

    def find(self, key: ReferenceKey, model: Any, parts: tuple[Any, ...], device: torch.device) -> KeysValues | None:
        """The result kept for these conditions, on `device`; None if there is none."""
        value = self.kept.find(key, (model, *parts))
        return None if value is None else _moved(value, device)

    def keep(self, key: ReferenceKey, model: Any, parts: tuple[Any, ...], value: KeysValues) -> None:
        """Keep a result in CPU memory."""
        self.kept.keep(key, (model, *parts), _moved(value, torch.device("cpu")))


def _moved(value: KeysValues, device: torch.device) -> KeysValues:
    return {block: (k.to(device), v.to(device)) for block, (k, v) in value.items()}
