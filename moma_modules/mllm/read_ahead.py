"""Weights in mapped files, brought from the disk while others are used.

A mapped weight is read where it is first looked at, and whoever looks waits. A thread that looks first, a bounded way
ahead, has the next layers read while one computes. It changes nothing: the pages are the system's, and what it does not
get to is read by the layer itself, as without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Condition, Thread
from types import TracebackType

import comfy.model_management
import torch
from torch import Tensor, nn

from ..host.messages import only_looking

AHEAD = 4 << 30
"""Bytes at most that are read before they are used, of half the free RAM if that is less: the disk is to be busy while
the vision tower computes, but not to push out what is needed sooner."""

PART = 8 << 20
"""Bytes after which the thread looks whether it should stop."""

STRIDE = 64 << 10
"""One byte of so many is looked at: systems read more than that around each."""

THREAD = "MoMA reads ahead"

_WHAT = "reading the language model's weights ahead of their use"


class ReadAhead:
    """A thread that reads tensors in the order of their use, from entering to leaving the context."""

    def __init__(self, steps: Sequence[Sequence[Tensor]], limit: int | None = None) -> None:
        """Read what is in RAM or in a file; what is on another device is left out.

        Args:
            steps: The tensors of each step.
            limit: Bytes ahead of the step that is reached; see `AHEAD` where None.
        """
        self._steps = [[tensor for tensor in step if _is_plain(tensor)] for step in steps]
        self._ends = list(accumulate(sum(tensor.nbytes for tensor in step) for step in self._steps))
        self._limit = _room() if limit is None else limit
        self._reached = -1
        self._left = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name=THREAD, daemon=True)

    def __enter__(self) -> "ReadAhead":
        """Start to read the first step."""
        if any(self._steps):
            with only_looking(_WHAT):
                self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """End, however the steps ended; waits for the part that is being read."""
        with self._changed:
            self._left = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def reached(self, step: int) -> None:
        """This step is used now, and those before it are done with."""
        with self._changed:
            self._reached = step
            self._changed.notify()

    def _run(self) -> None:
        with only_looking(_WHAT):
            for number, step in enumerate(self._steps):
                for part in (part for tensor in step for part in _parts(tensor)):
                    if not self._may_read(number):
                        break
                    look_at(part)

    def _may_read(self, step: int) -> bool:
        """Wait until a step is within the limit; False if it is used already or nothing more is to be read."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._is_near(step))
            return not self._left and step > self._reached

    def _is_near(self, step: int) -> bool:
        used = self._ends[self._reached] if self._reached >= 0 else 0
        return self._ends[step] - used <= self._limit


@contextmanager
def reading_ahead(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While layers run in this order: read the weights of each before it runs."""
    with ReadAhead([list(layer.parameters()) for layer in layers]) as ahead:
        handles = [
            layer.register_forward_pre_hook(lambda *_, number=number: ahead.reached(number))
            for number, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def look_at(part: Tensor) -> None:
    """Have the system read bytes [n] of a mapped file; PyTorch lets other threads run meanwhile."""
    part[::STRIDE].sum()


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.detach().view(-1).view(torch.uint8).split(PART)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its content is bytes in a row at an address of this process: no subclass that keeps it elsewhere."""
    return type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()


def _room() -> int:
    return min(AHEAD, int(comfy.model_management.get_free_memory(torch.device("cpu"))) // 2)
