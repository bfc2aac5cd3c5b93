"""The files that rows name: where they lie, whether they may be read, and what they hold."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from .index import Index
from .jobs import Upload
from .pictures import BrokenPictureError, check_picture
from .table import RowError

SERVER_FOLDER = "moma_batch"
"""Where a server's input folder has what is uploaded."""
KEPT = 256
"""So many files are known without asking the disk again: rows that follow one another often name the same ones."""
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class Inputs:
    """Finds files below some folders and remembers their digests, by size and time of change."""

    def __init__(self, index: Index, folders: Sequence[Path]) -> None:
        """Look below `folders`; a relative name is relative to the first."""
        self._index, self._folders = index, [folder.resolve() for folder in folders]
        self._found: dict[tuple[str, bool], tuple[Upload, str]] = {}

    def find(self, column: str, name: str, picture: bool = True) -> tuple[Upload, str]:
        """The file as it is to be uploaded, named after its content, and its SHA-256.

        Raises:
            RowError: It is missing, lies elsewhere, is no whole picture, or a URL.
        """
        known = (name, picture)
        if known not in self._found:
            if len(self._found) >= KEPT:
                self._found.clear()
            self._found[known] = self._find(column, name, picture)
        return self._found[known]

    def _find(self, column: str, name: str, picture: bool) -> tuple[Upload, str]:
        if _URL.match(name):
            raise RowError(f"{column} is {name[:80]!r}: addresses are not fetched; download it and name the file")
        try:
            path = (self._folders[0] / name).resolve()
            allowed = any(path.is_relative_to(folder) for folder in self._folders)
            if not allowed:
                home = self._folders[0]
                raise RowError(
                    f"{column} is {name[:80]!r}, which lies outside of {home}; name its folder with --inputs"
                )
            if not path.is_file():
                raise RowError(f"{column}: there is no file {path}")
            digest = self._digest(column, path, picture)
        except (OSError, ValueError, RuntimeError) as error:
            raise RowError(f"{column}: {name[:80]!r} cannot be read: {error}") from error
        suffix = path.suffix.lower() if re.fullmatch(r"\.[a-z0-9]{1,12}", path.suffix.lower()) else ""
        return Upload(f"{SERVER_FOLDER}/{digest[:2]}/{digest}{suffix}", path), digest

    def _digest(self, column: str, path: Path, picture: bool) -> str:
        status = path.stat()
        stamp = f"{status.st_size}-{status.st_mtime_ns}-{picture}"
        if known := self._index.digest(str(path), stamp):
            return known
        with path.open("rb") as file:
            if picture:
                content = file.read()
                try:
                    check_picture(content)
                except BrokenPictureError as error:
                    raise RowError(f"{column}: {path} cannot be used: {error}") from error
                digest = hashlib.sha256(content).hexdigest()
            else:
                found = hashlib.sha256()
                while part := file.read(1 << 20):
                    found.update(part)
                digest = found.hexdigest()
        self._index.remember_digest(str(path), stamp, digest)
        return digest
