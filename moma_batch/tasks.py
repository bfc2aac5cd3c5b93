"""What a task is: a picture to make, or a subject to encode first."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

APART = "apart"
"""In the journal: an encoding failed together with others, and is to be tried alone."""


class Planned(NamedTuple):
    """A task to put into the index; `needs` are the numbers of the encodings that come first."""

    id: str
    row: int
    name: str | None
    key: str
    encodes: bool
    grouped: str
    sort: str
    spec: dict[str, Any]
    needs: Sequence[int] = ()


@dataclass(frozen=True)
class Task:
    """A task of the index.

    Attributes:
        attempts: Those that were charged.
        alone: It shares no prompt of a server with other tasks.
    """

    no: int
    id: str
    row: int
    name: str
    key: str
    encodes: bool
    spec: dict[str, Any]
    state: str
    attempts: int
    message: str
    result: dict[str, Any]
    alone: bool = False


COLUMNS = "no, id, row, name, key, encodes, spec, state, attempts, message, result, alone"
"""Of the index, in the order in which `task_of` takes them."""


def task_of(found: tuple[Any, ...]) -> Task:
    """A task from its columns."""
    no, task_id, row, name, key, encodes, spec, state, attempts, message, result, alone = found
    read = json.loads(result) if result else {}
    rest = (json.loads(spec), state, attempts, message, read, bool(alone))
    return Task(no, task_id, row, name or "", key, bool(encodes), *rest)
