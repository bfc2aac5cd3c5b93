"""Results kept from run to run while the objects that they were computed with are still the same ones."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..adapter.loading import Adapter
from ..adapter.networks import AdapterModule

CAPACITY = 256 * 2**20
"""Bytes of CPU memory for references, per loaded adapter. One at 25 % mask takes 11 MB in 16 bit."""

ENCODINGS_CAPACITY = 16 * 2**20
"""For each of pictures and words. One reference takes 64 kB."""

Value = TypeVar("Value")


@dataclass
class ObjectBoundCache(Generic[Value]):
    """Values by key, as long as the objects they were computed with are the same ones.

    The longest unused give way, and those whose objects are gone; the newest always stays.

    Attributes:
        size: Bytes of a value.
        capacity: Bytes of all.
    """

    size: Callable[[Value], int]
    capacity: int
    _entries: OrderedDict[Hashable, tuple[tuple[Callable[[], Any], ...], Value]] = field(
        default_factory=OrderedDict, repr=False
    )

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def find(self, key: Hashable, objects: tuple[Any, ...]) -> Value | None:
        """The value kept under `key` with these very objects; None if there is none."""
        known, value = self._entries.get(key, ((), None))
        if value is None or len(known) != len(objects):
            return None
        if any(then() is not now for then, now in zip(known, objects, strict=True)):
            return None
        self._entries.move_to_end(key)
        return value

    def keep(self, key: Hashable, objects: tuple[Any, ...], value: Value) -> None:
        """Keep a value until one of the objects, none of them None, is another; they are not kept alive."""
        for old in [k for k, (known, _) in self._entries.items() if k == key or any(then() is None for then in known)]:
            del self._entries[old]
        self._entries[key] = (tuple(map(_identity, objects)), value)
        while len(self._entries) > 1 and sum(self.size(value) for _, value in self._entries.values()) > self.capacity:
            self._entries.popitem(last=False)


def _identity(part: Any) -> Callable[[], Any]:
    """How to compare with this object later, without keeping it alive where Python can do that."""
    try:
        return weakref.ref(part)
    except TypeError:  # a number, a string, a tuple
        return lambda: part


KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Block index to keys and values [1, N, C] of the N reference tokens that lie on the subject."""


@dataclass(frozen=True)
class ReferenceKey:
    """What the result of a subject's reference passes depends on, beside objects: see `AdapterCaches.references`.

    Attributes:
        content: Hash of latents, noise, text and masks.
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


def _encodings() -> ObjectBoundCache[Tensor]:
    return ObjectBoundCache(lambda tensor: tensor.nbytes, ENCODINGS_CAPACITY)


def _references() -> ObjectBoundCache[KeysValues]:
    return ObjectBoundCache(lambda found: sum(part.nbytes for pair in found.values() for part in pair), CAPACITY)


@dataclass
class AdapterCaches:
    """What was computed through one loaded adapter, in CPU memory.

    Attributes:
        pictures: Latents by the content of the pictures, with a VAE.
        words: Encodings by the word, with a CLIP.
        references: By `ReferenceKey`; with the model and whatever else a result depends on that is itself only while it
            is the same object: object patches, LoRA injections, the chosen attention function.
    """

    pictures: ObjectBoundCache[Tensor] = field(default_factory=_encodings)
    words: ObjectBoundCache[Tensor] = field(default_factory=_encodings)
    references: ObjectBoundCache[KeysValues] = field(default_factory=_references)


_OF_ADAPTERS: WeakKeyDictionary[AdapterModule, AdapterCaches] = WeakKeyDictionary()


def caches_of(adapter: Adapter) -> AdapterCaches:
    """The caches of a loaded adapter. They hang on its weights from outside and go with them."""
    return _OF_ADAPTERS.setdefault(adapter.module, AdapterCaches())
