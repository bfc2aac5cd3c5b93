"""Which tasks the next run is to try again."""

import contextlib
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from .index import NAME
from .journal import entries

FAILED = ("refused", "failed", "poison")


def to_retry(folder: Path, ids: Sequence[str]) -> list[str]:
    """The failed tasks of these rows, with the encodings that they failed for; of all rows if none is named.

    A row with many seeds is meant as a whole, or as its one picture: `r1`, or `r1_7`.

    Raises:
        ValueError: A row has not failed.
    """
    states: dict[str, bool] = {}
    for entry in entries(folder):
        if entry["event"] in ("end", "retry"):
            states[str(entry["task"])] = entry.get("status") in FAILED
    failed = [task for task, bad in states.items() if bad]
    if not ids:
        return failed
    causes = [(task, task) for task in failed]
    causes += [(task, cause) for task, cause in _failed_encodings(folder) if cause in failed]
    chosen: dict[str, None] = {}
    for row in ids:
        found = [cause for task, cause in causes if re.fullmatch(rf"{re.escape(row)}(_\d+)?", task)]
        if not found:
            known = sorted({task for task, _ in causes if not task.startswith("encoding:")})
            raise ValueError(f"{row!r} has not failed. Failed: {', '.join(known[:20]) or 'none'}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _failed_encodings(folder: Path) -> list[tuple[str, str]]:
    """Tasks with the encodings that they need, from the last run's index; empty where it is gone."""
    query = "SELECT t.id, e.id FROM needs n JOIN tasks t ON t.no = n.task JOIN tasks e ON e.no = n.encoding"
    with contextlib.suppress(sqlite3.Error):
        if (folder / NAME).is_file():
            with contextlib.closing(sqlite3.connect(folder / NAME)) as index:
                return [(str(task), str(encoding)) for task, encoding in index.execute(query)]
    return []
