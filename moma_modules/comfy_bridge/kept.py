"""Results kept while the objects that they were computed with are still the same ones."""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


@dataclass
class Kept(Generic[Value]):
    """Values by key. The longest unused give way, and those whose objects are gone; the newest always stays.

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


def content_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _identity(part: Any) -> Callable[[], Any]:
    """How to compare with this object later, without keeping it alive where Python can do that."""
    try:
        return weakref.ref(part)
    except TypeError:  # a number, a string, a tuple
        return lambda: part
