"""The journal: one JSON object a line, only ever appended to. It is the truth; everything else is made of it."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


class Journal:
    """Appends to `journal.jsonl`, or another such file, in a folder; only one process does."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        """Open it. A last line that a crash cut off is closed, so that the next one is whole."""
        self._file = (folder / name).open("ab+")
        self._file.seek(0, os.SEEK_END)
        self._close_torn_line()
        self._unsynced = False

    def _close_torn_line(self) -> None:
        if self._file.tell() == 0:
            return
        self._file.seek(-1, os.SEEK_END)
        if self._file.read(1) != b"\n":
            self._file.write(b"\n")

    def add(self, event: str, entry: Mapping[str, Any], kept: bool = True) -> None:
        """Append one entry. One that does not get into the file whole leaves no half line.

        Args:
            kept: It must outlive the machine: `sync` has it on the disk, with all others since the last `sync`.
        """
        line = json.dumps({"event": event, "at": round(time.time(), 3), **entry}).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
        except OSError:
            self._discard(start)
            raise
        self._unsynced |= kept

    def sync(self) -> None:
        """Return once every entry that is to be kept is on the disk."""
        if self._unsynced:
            os.fsync(self._file.fileno())
            self._unsynced = False

    def _discard(self, start: int) -> None:
        """Forget what could not be written, in the buffer too."""
        name = self._file.name
        with contextlib.suppress(OSError):
            self._file.close()
        os.truncate(name, start)
        self._file = open(name, "ab+")  # noqa: SIM115

    def close(self) -> None:
        """Sync and close the file."""
        try:
            self.sync()
        finally:
            self._file.close()


def entries(folder: Path, name: str = NAME) -> Iterator[dict[str, Any]]:
    """The entries in their order; what a crash cut off is left out."""
    path = folder / name
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "event" in found:
                yield found
