"""Keys and values of reference passes, kept from run to run while nothing that they depend on has changed."""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class _Entry:
    """`model` and `parts` are compared by identity and not kept alive."""

    model: Callable[[], Any]
    parts: tuple[Callable[[], Any], ...]
    value: KeysValues

    def fits(self, model: Any, parts: tuple[Any, ...]) -> bool:
        if self.model() is not model or len(parts) != len(self.parts):
            return False
        return all(known() is part for known, part in zip(self.parts, parts, strict=True))


@dataclass
class ReferenceCache:
    """Belongs to a loaded adapter and goes with it. Least recently used entries give way.

    `parts` are what else a result depends on and is itself only while it is the same object: object patches, LoRA
    injections, the chosen attention function. None of them is None.
    """

    _entries: OrderedDict[ReferenceKey, _Entry] = field(default_factory=OrderedDict, repr=False)

    def find(self, key: ReferenceKey, model: Any, parts: tuple[Any, ...], device: torch.device) -> KeysValues | None:
        """The result kept for these conditions, on `device`; None if there is none."""
        entry = self._entries.get(key)
        if entry is None or not entry.fits(model, parts):
            return None
        self._entries.move_to_end(key)
        return _moved(entry.value, device)

    def keep(self, key: ReferenceKey, model: Any, parts: tuple[Any, ...], value: KeysValues) -> None:
        """Keep a result in CPU memory. Those of models that are gone make room."""
        for old in [k for k, entry in self._entries.items() if k == key or entry.model() is None]:
            del self._entries[old]
        self._entries[key] = _Entry(identity(model), tuple(map(identity, parts)), _moved(value, torch.device("cpu")))
        while len(self._entries) > 1 and sum(_size(entry.value) for entry in self._entries.values()) > CAPACITY:
            self._entries.popitem(last=False)


def content_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(part: Any) -> Callable[[], Any]:
    """How to compare with this object later, without keeping it alive where Python can do that."""
    try:
        return weakref.ref(part)
    except TypeError:  # a number, a string, a tuple
        return lambda: part


def _moved(value: KeysValues, device: torch.device) -> KeysValues:
    return {block: (k.to(device), v.to(device)) for block, (k, v) in value.items()}


def _size(value: KeysValues) -> int:
    return sum(tensor.nbytes for pair in value.values() for tensor in pair)
