"""Subject masks of finished runs, found again by the latent that a run returned."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from .live_mask import Film

CAPACITY = 16
"""Runs remembered per patched model; a mask of a 64x64 latent takes 16 KiB, its film up to 32 KiB."""


@dataclass(frozen=True)
class FinishedRun:
    """What is kept of a run.

    Attributes:
        masks: {subject key: [B, h, w] in 0..1}, the last ones.
        film: Evaluation number and {subject key: [B, h, w] in 0..1}, in order; the last one is `masks`.
    """

    masks: dict[str, Tensor]
    film: tuple[tuple[int, dict[str, Tensor]], ...]


@dataclass
class RunLog:
    """Results, not state: nothing in a run reads it."""

    _runs: OrderedDict[str, FinishedRun] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def record(self, samples: Tensor, masks: dict[str, Tensor], film: Film) -> None:
        """Remember the masks {subject key: [B, h, w] in 0..1} and the film of the run that returned `samples`.

        The film's subjects are in the order of `masks`.
        """
        last = {key: mask.to("cpu", torch.float32) for key, mask in masks.items()}
        frames = [
            (number, dict(zip(masks, frame.to("cpu").float() / 255, strict=True)))
            for number, frame in film.frames
            if number != film.count
        ]
        with self._lock:
            self._runs[_fingerprint(samples)] = FinishedRun(last, (*frames, (film.count, last)))
            while len(self._runs) > CAPACITY:
                self._runs.popitem(last=False)

    def find(self, samples: Tensor) -> dict[str, Tensor] | None:
        """The masks of the run that returned `samples`, or None."""
        run = self.find_run(samples)
        return None if run is None else run.masks

    def find_run(self, samples: Tensor) -> FinishedRun | None:
        """All that is kept of the run that returned `samples`, or None."""
        with self._lock:
            return self._runs.get(_fingerprint(samples))


def _fingerprint(samples: Tensor) -> str:
    # A sampler node may hand the result on in the intermediate dtype; half precision is the coarsest.
    values = samples.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()
