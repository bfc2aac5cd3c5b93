"""Files on the disk: names that a graph gives, digests, writing whole or not at all, space, locks."""

import errno
import hashlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

SUFFIX = ".safetensors"
LONGEST = 200
"""Bytes of a name; systems allow 255, and a number and suffixes come on top."""

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]')
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[\d¹²³]|LPT[\d¹²³])", re.IGNORECASE)


def check_new_name(input_name: str, name: str, root: str) -> None:
    """Check that a name is a file name, with subfolders if wanted, that every system can have.

    Args:
        input_name: The node's input that the message names.
        root: The folder that the file is to be in, for the message.

    Raises:
        ValueError: Naming the input, what is wrong with it and what to do.
    """
    *folders, last = portable(name).split("/")
    problem = None
    if not last.strip():
        problem = "ends without a name"
    elif folders[:1] == [""]:
        problem = f"is an absolute path; the file goes below {root} only"
    elif ".." in (*folders, last):
        problem = f"leads out of its folder with '..'; the file goes below {root} only"
    else:
        problem = next(filter(None, map(_problem, [*folders, f"{last}{SUFFIX}"])), None)
    if problem:
        raise ValueError(f"{input_name} {name[:80]!r} {problem}. Give a name such as 'cup' or 'cars/red'.")


def portable(name: str) -> str:
    """One spelling on every system, so that a workflow saved on Windows finds its files elsewhere, and back."""
    return name.strip().replace("\\", "/")


def _problem(part: str) -> str | None:
    """What keeps some system from having a file or folder of this name."""
    if found := _FORBIDDEN.search(part):
        return f"holds {found[0]!r}, which not every system allows in a file name"
    if not part.rstrip(". "):
        return f"has the folder name {part!r}"
    if part != part.rstrip(". "):
        return f"has the folder name {part!r}, which ends in a dot or space"
    if _DEVICES.fullmatch(part.split(".")[0].rstrip()):
        return f"has the name {part.removesuffix(SUFFIX)!r}, which is a device on Windows"
    if len(part.encode()) > LONGEST:
        return f"has a name of {len(part.encode())} bytes; at most {LONGEST} are possible"
    return None


def content_hash(*parts: str | bytes | Tensor) -> str:
    """SHA-256, in hexadecimal, over texts, bytes and tensors; of these it takes dtype, shape and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}|{tuple(part.shape)}|".encode())
            digest.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path, new: bool = False) -> Iterator[Path]:
    """Gives a place beside `path` to write to. What lies there in the end becomes `path`; after a failure nothing does.

    Args:
        new: Refuse to replace a file, or to write one that another thread or process is just writing.

    Raises:
        FileExistsError: See `new`.
    """
    partial = path.with_name(f"{path.name}{'' if new else '.' + uuid.uuid4().hex}.part")
    partial.open("xb").close()  # who made this one may make `path`, and nobody else
    try:
        if new and path.exists():
            raise FileExistsError(f"{path} is there already.")
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
