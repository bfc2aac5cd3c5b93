"""What goes to a worker and what comes back. Both can be pickled, for workers in other processes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Graph = dict[str, dict[str, Any]]
"""An API prompt: nodes by id, each with `class_type` and `inputs`."""

Status = Literal["ok", "refused", "failed", "fault", "stopped", "full"]
"""How an attempt ended.

- ok: there are files.
- refused: the server did not take the prompt; another attempt would end alike.
- failed: a node raised an exception that is the row's own.
- fault: the server died, hung, lost the prompt, ran out of memory or gave a broken file. Charged to the row.
- stopped: we ended it. Not charged.
- full: a disk is full. Not charged.
"""


@dataclass(frozen=True)
class Upload:
    """A file for the server's input folder.

    Attributes:
        name: As nodes name it there: `moma_batch/...`.
        path: Where it lies here.
    """

    name: str
    path: Path

    def read(self) -> bytes:
        """Its content.

        Raises:
            OSError: It cannot be read.
        """
        return self.path.read_bytes()


@dataclass(frozen=True)
class Job:
    """One attempt at one task, or at several encodings of one picture.

    Attributes:
        task: The first task's id, as in the journal.
        keys: The tasks' keys.
        attempt: 1 for the first.
        prompt_id: The prompt's id on the server, a UUID.
        graph: What to queue.
        uploads: What must be in the server's input folder before.
        encodes: Whether it gives a subject for each key; else it gives pictures.
        mark: What SaveImage writes into each picture.
        timeout: Seconds after which the server counts as hung.
        resumed: An earlier driver may have queued it on this worker already.
    """

    task: str
    keys: tuple[str, ...]
    attempt: int
    prompt_id: str
    graph: Graph
    uploads: tuple[Upload, ...]
    encodes: bool
    mark: dict[str, Any]
    timeout: float
    resumed: bool = False


@dataclass(frozen=True)
class Produced:
    """A file that a prompt made, under the server's name for it."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        node: The class of the node that failed, if one did.
        restart: Whether the worker must be made well before it gets another job.
    """

    status: Status
    message: str = ""
    node: str = ""
    files: tuple[Produced, ...] = ()
    seconds: float = 0.0
    restart: bool = False
    versions: dict[str, str] = field(default_factory=dict)
