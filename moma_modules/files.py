"""Disk space, locks and digests for files of many gigabytes."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

CHUNK = 1 << 24
"""Bytes handled between two reports."""

Report = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and what is being done. It may raise to stop the work."""


def megabytes(count: float) -> str:
    """A size for people: MB below 1 GB, else GB with one digit."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what does not fit on the disk of `folder`.

    Raises:
        OSError: ENOSPC.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {megabytes(needed)} more on the disk of {folder}, but {megabytes(free)} are free. "
            "Make room, or give ComfyUI another models folder in extra_model_paths.yaml (key moma)",
        )


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on `path` against other processes and threads, by a file beside it.

    The system frees the lock of a process that dies. The lock file goes when the work is done, and stays after a
    failure, when others may be waiting for it.

    Args:
        waiting: Called several times a second while another holds the lock. It may raise.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            waiting()
    try:
        yield
        remove_lock_file(lock)
    finally:
        lock.release()


def remove_lock_file(lock: FileLock) -> None:
    """Remove the file of a lock that is held. Windows does not let go of an open file: there it goes on release."""
    with suppress(PermissionError):
        Path(lock.lock_file).unlink(missing_ok=True)
