"""How much of the disk a run will take, and whether there is so much."""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from .graphs import graph_of
from .index import Index
from .jobs import Graph
from .workflow import SAVE_IMAGE

PNG_BYTES_PER_PIXEL = 2.0
"""Of a photograph; noise takes 3. Known better as soon as there are results."""
SUBJECT_BYTES = 8 << 10
REFERENCE_BYTES = 512 * 512 * 4
"""Picture and mask beside the subjects of a photograph."""
SAMPLED = 200
ENOUGH = 10
"""From so many results on, they say more than the workflow does."""
LOOK_SECONDS = 30.0


class Space:
    """What is still to be written into a run's folder, beside what is free there."""

    def __init__(self, folder: Path, index: Index, keep_free: int, copies_inputs: bool) -> None:
        """Look at an index in which the journal's results are.

        Args:
            keep_free: Bytes that the run leaves free.
            copies_inputs: Whether the workers lie in the folder too, and get copies of pictures and subjects.
        """
        self._folder, self._index, self._keep_free, self._copies = folder, index, keep_free, copies_inputs
        self._looked, self._warned = time.monotonic(), False

    def needed(self) -> int | None:
        """Bytes; None where neither results nor the workflow tell the size of a picture."""
        index = self._index
        left = [_left(index.counts(kind)) for kind in (False, True)]
        picture = self._picture_bytes() if left[0] else 0.0
        if picture is None:
            return None
        photos, inputs = self._photos() if left[1] else (0, 0)
        subjects = left[1] * SUBJECT_BYTES + photos * REFERENCE_BYTES
        return int(left[0] * picture) + (2 * subjects + inputs if self._copies else subjects)

    def line(self) -> str:
        """What the run will take and what is free, for the user; "" where nothing is to be done."""
        if not any(_left(self._index.counts(kind)) for kind in (False, True)):
            return ""
        needed, free = self.needed(), shutil.disk_usage(self._folder).free
        if needed is None:
            return f"How large the pictures will be is not known yet; {_size(free)} are free in {self._folder}."
        return (
            f"About {_size(needed)} will be written; {_size(free)} are free in {self._folder}.{self._warning(needed)}"
        )

    def look(self, say: Callable[[str], None]) -> None:
        """Every half minute: warn, once, if the results so far show that the rest will not fit."""
        moment = time.monotonic()
        if self._warned or moment - self._looked < LOOK_SECONDS:
            return
        self._looked = moment
        if len(self._index.sizes(SAMPLED)) >= ENOUGH and (warning := self._warning(self.needed() or 0)):
            say(f"About {_size(self.needed() or 0)} are still to be written.{warning}")

    def _warning(self, needed: int) -> str:
        room = shutil.disk_usage(self._folder).free - self._keep_free
        if needed <= room:
            return ""
        self._warned = True
        return (
            f" That will not fit: {_size(max(0, room))} may be filled (--keep-free {self._keep_free >> 20}). Make "
            "room, or the run stops once the disk is full, and goes on by the same command."
        )

    def _picture_bytes(self) -> float | None:
        """The mean of the results, else by the graphs of some tasks."""
        made = self._index.sizes(SAMPLED)
        if len(made) >= ENOUGH:
            return sum(made) / len(made)
        pixels = [_pixels(graph_of(task.spec)) for task in self._index.pending(SAMPLED)]
        known = [found for found in pixels if found]
        return PNG_BYTES_PER_PIXEL * sum(known) / len(known) if known else None

    def _photos(self) -> tuple[int, int]:
        """How many photographs have subjects to encode, and their bytes."""
        count = total = 0
        for task in self._index.to_encode():
            count += 1
            with contextlib.suppress(OSError):
                total += sum(Path(path).stat().st_size for _, path in task.spec["files"].values())
        return count, total


def _left(states: dict[str, int]) -> int:
    return states.get("pending", 0) + states.get("running", 0)


def _pixels(graph: Graph) -> int:
    """Of all pictures that a graph saves; 0 where it does not say."""
    pixels = 0
    for node in graph.values():
        inputs = node["inputs"]
        width, height = inputs.get("width"), inputs.get("height")
        if node["class_type"].startswith("Empty") and isinstance(width, int) and isinstance(height, int):
            count = inputs.get("batch_size", 1)
            pixels = max(pixels, width * height * (count if isinstance(count, int) else 1))
    return pixels * sum(node["class_type"] == SAVE_IMAGE for node in graph.values())


def _size(count: float) -> str:
    """As in "3.2 GB"."""
    for unit in ("KB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
