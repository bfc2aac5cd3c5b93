"""Subject masks of finished runs, found again by the latents that a run returned.

A run writes them into the log of each of its subjects. ComfyUI may drop a patched MODEL while it keeps a sampler's
LATENT: under memory pressure all that has a patcher goes first (MODEL, CLIP, VAE, adapter); a subject goes after the
LATENT. Latents are known by their content, picture by picture: a copy, part of a batch or a joined batch is found too.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.disk import content_hash

CAPACITY = 32 * 2**20
"""Bytes that the masks and films of a subject's runs may take; for one picture of 64x64 latents a run takes 44 KB."""
MOST_RUNS = 256
MOST_DROPPED = 4096
"""Pictures of which the log still knows that it held them."""
FILM_SIDE = 64
FILM_BYTES = 256 * 2**10


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What is kept of a run.

    Attributes:
        keys: The keys of its S subjects.
        masks: [S, B, h, w] float32 in 0..1, the last ones.
        count: Evaluations of the model.
        numbers: Those that the film shows, from 1.
        film: [F, S, B, h, w] uint8, the masks that these ended with; at most FILM_SIDE high and wide.
    """

    keys: tuple[str, ...]
    masks: Tensor
    count: int
    numbers: tuple[int, ...]
    film: Tensor

    @classmethod
    def of(cls, keys: tuple[str, ...], masks: Tensor, count: int, frames: list[tuple[int, Tensor]]) -> "FinishedRun":
        """From masks [S, B, h, w] in 0..1 and frames (evaluation, [S, B, h, w] uint8) on any device."""
        small = [(number, _small(frame).cpu()) for number, frame in frames if number != count]
        while small and sum(frame.nbytes for _, frame in small) > FILM_BYTES:
            small = small[: len(small) // 2 * 2 : 2] if len(small) > 1 else []
        film = torch.stack([frame for _, frame in small]) if small else torch.zeros(0, dtype=torch.uint8)
        return cls(keys, masks.to("cpu", torch.float32).clone(), count, tuple(number for number, _ in small), film)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.masks.nbytes + self.film.nbytes


@dataclass(frozen=True)
class FoundRun:
    """What the log knows of some latents.

    Attributes:
        masks: {subject key: [N, h, w] in 0..1}, the last ones.
        film: Evaluation number and {subject key: [N, h, w] in 0..1}, in order; the last one is `masks`.
    """

    masks: dict[str, Tensor]
    film: tuple[tuple[int, dict[str, Tensor]], ...]


@dataclass
class RunLog:
    """Bounded in bytes and in number; the oldest runs give way, the newest always stays.

    Attributes:
        latest: What `sequence.py` knows of the run before, while one node makes several.
    """

    latest: Any = field(default=None, repr=False)
    _runs: OrderedDict[int, tuple[FinishedRun, list[str]]] = field(default_factory=OrderedDict, repr=False)
    _places: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    _dropped: OrderedDict[str, None] = field(default_factory=OrderedDict, repr=False)
    _number: int = 0
    _bytes: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __reduce__(self) -> Any:
        """A copied or pickled log is an empty one: it belongs to the objects of this process."""
        return RunLog, ()

    def __len__(self) -> int:
        """How many runs are kept."""
        return len(self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self._bytes

    def record(self, samples: Tensor, run: FinishedRun) -> None:
        """Remember the run that returned `samples` [B, C, h, w]."""
        names = _fingerprints(samples)
        with self._lock:
            self._number += 1
            self._runs[self._number] = run, names
            self._bytes += run.nbytes
            for i, name in enumerate(names):
                self._places[name] = self._number, i
                self._dropped.pop(name, None)
            while len(self._runs) > 1 and (len(self._runs) > MOST_RUNS or self._bytes > CAPACITY):
                self._drop_oldest()

    def find(self, samples: Tensor) -> FoundRun | None:
        """What is known of `samples` [N, C, h, w], pictures of one run or of several; None if one is unknown."""
        names = _fingerprints(samples)
        with self._lock:
            places = [self._places.get(name) for name in names]
            if not places or any(place is None for place in places):
                return None
            return _joined([(self._runs[place[0]][0], place[1]) for place in places if place is not None])

    def dropped(self, samples: Tensor) -> bool:
        """Whether the log held one of these pictures and let go of it."""
        with self._lock:
            return any(name in self._dropped for name in _fingerprints(samples))

    def _drop_oldest(self) -> None:
        number, (run, names) = self._runs.popitem(last=False)
        self._bytes -= run.nbytes
        for name in names:
            if self._places.get(name, (0, 0))[0] == number:
                del self._places[name]
                self._dropped[name] = None
        while len(self._dropped) > MOST_DROPPED:
            self._dropped.popitem(last=False)


def _joined(pictures: list[tuple[FinishedRun, int]]) -> FoundRun:
    """Of pictures, each number i of its run's batch. A film needs runs that show the same evaluations."""
    first = pictures[0][0]
    keys = [key for key in first.keys if all(key in run.keys for run, _ in pictures)]

    def of(key: str, frame: int | None) -> Tensor:
        parts = []
        for run, i in pictures:
            masks = run.masks if frame is None else run.film[frame].float() / 255
            parts.append(masks[run.keys.index(key), i])
        return torch.stack(parts)

    numbers = first.numbers if all(run.numbers == first.numbers for run, _ in pictures) else ()
    film = [(number, {key: of(key, frame) for key in keys}) for frame, number in enumerate(numbers)]
    last = {key: of(key, None) for key in keys}
    return FoundRun(last, (*film, (max(run.count for run, _ in pictures), last)))


def _small(frame: Tensor) -> Tensor:
    high, wide = frame.shape[-2:]
    if max(high, wide) <= FILM_SIDE:
        return frame
    scale = FILM_SIDE / max(high, wide)
    size = (max(1, round(high * scale)), max(1, round(wide * scale)))
    return interpolate(frame.cpu().float(), size=size, mode="area").round().to(torch.uint8)


def _fingerprints(samples: Tensor) -> list[str]:
    """One for each picture. A sampler node may hand the result on in the intermediate dtype; half is the coarsest."""
    return [content_hash(picture) for picture in samples.detach().to("cpu", torch.float16)]
