"""One driver for a folder: a lock that the system frees when its process dies."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class LockedError(Exception):
    """Another driver works in the folder; the message says which."""


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        LockedError: Another process holds it.
    """
    path = folder / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError as error:
            holder = path.read_text(encoding="utf-8", errors="replace").strip() if os.name != "nt" else ""
            raise LockedError(
                f"Another moma_batch works in {folder} ({holder or 'see the other terminal'}). Wait for it, or end it; "
                "`status` shows how far it is."
            ) from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            _unlock(file)


def is_held(folder: Path) -> bool:
    """Whether a driver works in the folder now."""
    if not (folder / "lock").is_file():
        return False
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError:
            return True
        _unlock(file)
    return False


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0, os.SEEK_END)

    def _unlock(file: IO[str]) -> None:
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
