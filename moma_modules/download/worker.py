"""The process that downloads. It is run by path and imports nothing of the pack.

The first argument is a JSON object {"repository", "folder", "files"}. What happens is written to standard output, one
JSON object a line: {"done", "total", "text"}, {"error"} or {"finished"}. When standard input ends, so does the process:
it does not outlive the one that started it, and stops at once when that closes or kills it.

A file is fetched to `NAME.ETAG.part` beside its place, from where an earlier try left off, and gets its name only once
size and checksum are those that the hub states.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

CHUNK = 1 << 20
POLL_SECONDS = 0.2
ATTEMPTS = 20
"""How often one file's connection may break."""


class RefusedError(Exception):
    """The download cannot be done; the message is for the user."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub. `etag` is its SHA-256, or git's SHA-1 of it if it is small."""

    name: str
    url: str
    size: int
    etag: str


def tell(**event: Any) -> None:
    """Report to the process that waits."""
    assert sys.__stdout__ is not None
    sys.__stdout__.write(json.dumps(event) + "\n")
    sys.__stdout__.flush()


def download(repository: str, folder: Path, names: list[str]) -> None:
    """Fetch those of the files that are not in the folder.

    Raises:
        RefusedError: Saying why not.
    """
    wanted = [name for name in names if not (folder / name).is_file()]
    if not wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    remote = _look_up(repository, wanted)
    parts = {file.name: folder / f"{file.name}.{file.etag[:16]}.part" for file in remote}
    total = sum(file.size for file in remote)
    present = sum(_size(part) for part in parts.values())
    free = shutil.disk_usage(folder).free
    if total - present > free:
        raise RefusedError(
            f"{(total - present) / 1e9:.2f} GB are still to be fetched, but the disk of {folder} has "
            f"{free / 1e9:.2f} GB free. Make room there, or give "
            "ComfyUI another models folder in extra_model_paths.yaml (key moma)."
        )
    before = 0
    for file in remote:
        with _Progress(parts[file.name], before, total) as progress:
            _fetch(file, parts[file.name], folder / file.name, progress)
        before += file.size
    tell(done=total, total=total, text="Done")


def _look_up(repository: str, names: list[str]) -> list[RemoteFile]:
    """Sizes and checksums, all of one commit."""
    found = []
    revision = "main"
    for name in names:
        metadata = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
        revision = metadata.commit_hash or revision
        if metadata.size is None or metadata.etag is None or len(metadata.etag) not in (40, 64):
            raise RefusedError(f"The hub states no size or checksum of {name}, so it cannot be checked.")
        found.append(RemoteFile(name, hf_hub_url(repository, name, revision=revision), metadata.size, metadata.etag))
    return found


def _fetch(file: RemoteFile, part: Path, target: Path, progress: "_Progress") -> None:
    """Fetch one file, unless another process does so meanwhile."""
    progress.say(f"Waiting for another process that fetches {file.name}")
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    with lock:
        if not target.is_file():
            if part.is_symlink():
                raise RefusedError(f"{part} is a link: remove it.")
            progress.say(file.name)
            if _size(part) != file.size:
                with part.open("ab") as stream:
                    _get(file, stream)
            progress.say(f"Checking {file.name}")
            _check(file, part)
            part.replace(target)
        with suppress(PermissionError):  # Windows does not let go of an open file: there it goes on release
            Path(lock.lock_file).unlink(missing_ok=True)


def _get(file: RemoteFile, stream: BinaryIO) -> None:
    """Fetch the rest of a file. A connection that breaks is taken up where it broke, as long as something arrives."""
    for attempt in range(1, ATTEMPTS + 1):
        if stream.tell() > file.size:
            stream.truncate(0)
            stream.seek(0)
        start = stream.tell()
        try:
            http_get(
                file.url,
                stream,
                resume_size=start,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
            return
        except Exception as error:  # which ones it may raise differs between the releases of huggingface_hub
            refused = _status(error) is not None or (isinstance(error, OSError) and error.errno is not None)
            if refused or stream.tell() <= start or attempt == ATTEMPTS:
                raise


def _check(file: RemoteFile, part: Path) -> None:
    """Compare a fetched file with what the hub says of it; a wrong one is removed."""
    digest = hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())
    with part.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    if _size(part) != file.size or digest.hexdigest() != file.etag:
        size = _size(part)
        part.unlink()
        raise RefusedError(
            f"{file.name} arrived damaged and was removed: {size} bytes with checksum {digest.hexdigest()[:16]}, "
            f"expected {file.size} bytes with {file.etag[:16]}."
        )


class _Progress:
    """Tells the size of a growing file, several times a second, until left."""

    def __init__(self, part: Path, before: int, total: int) -> None:
        self._part, self._before, self._total, self._text = part, before, total, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def say(self, text: str) -> None:
        """What to show beside the number from now on."""
        self._text = text

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            tell(done=self._before + _size(self._part), total=self._total, text=self._text)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _explain(error: Exception, folder: Path) -> str:
    """What to tell the user of a failure."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is fetched. Unset it and start ComfyUI again."
    status = _status(error)
    if status in (401, 403):
        return f"The hub refused access ({status}). Check HF_TOKEN, or the login that huggingface_hub has saved."
    if status == 404 or isinstance(error, EntryNotFoundError):
        return f"The hub does not have it ({status}): {_first_line(error)}."
    if status is not None:
        return f"The hub answered with status {status}: {_first_line(error)}."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {folder} is full. Make room; what is there is kept."
    if isinstance(error, PermissionError):
        return f"{folder} cannot be written to: {error}"
    return f"The connection failed ({type(error).__name__}: {_first_line(error)}). What is there is kept."


def _status(error: Exception) -> int | None:
    """The status of the answer that was an error; huggingface_hub passes on those of the library below it, too."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def main() -> None:
    """Do the job on the command line."""
    sys.stdout = sys.stderr  # standard output is for `tell` alone, whatever a library prints
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(sys.argv[1])
    try:
        download(job["repository"], Path(job["folder"]), job["files"])
    except Exception as error:  # whatever it is, the user is to read it at the node
        tell(error=_explain(error, Path(job["folder"])))
    else:
        tell(finished=True)


if __name__ == "__main__":
    main()
