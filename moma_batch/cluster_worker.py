"""What an actor of the cluster is: a `Worker` as on one machine, whose inputs come through Ray."""

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jobs import Job, Outcome, Upload
from .models import find_comfyui, find_python
from .process import Launch
from .server import GoneError
from .table import TableError
from .worker import Patience, Worker, WorkerSpec

THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class SentUpload(Upload):
    """An upload whose content lies in Ray's object store, or why the driver could not read it.

    Attributes:
        content: Ray's reference to the bytes.
    """

    content: Any = None

    def read(self) -> bytes:
        """See `Upload`; fetched once the server is to have it."""
        if isinstance(self.content, OSError):
            raise self.content
        import ray

        return bytes(ray.get(self.content))


@dataclass(frozen=True)
class ClusterSpec:
    """A worker that may come to any machine.

    Attributes:
        folder: A name for its folder, below that machine's folder for temporary files.
        comfyui: The folder of ComfyUI on that machine.
        python: The Python that can run it; None to look for one there.
        arguments: More for ComfyUI's command line.
        has_card: Whether Ray gives it a card.
    """

    name: str
    folder: str
    comfyui: Path
    python: str | None
    arguments: tuple[str, ...]
    has_card: bool
    patience: Patience
    jobs_between_starts: int = 0
    most_memory: int = 0

    def here(self) -> WorkerSpec:
        """The worker on this machine.

        Raises:
            TableError: ComfyUI is not there.
        """
        comfyui = find_comfyui(self.comfyui)
        # With a card, Ray has set CUDA_VISIBLE_DEVICES to it alone.
        place = () if self.has_card or sys.platform == "darwin" else ("--cpu",)
        folder = Path(tempfile.gettempdir()) / self.folder
        launch = Launch(comfyui, find_python(self.python, comfyui), folder, (*place, *self.arguments))
        return WorkerSpec(self.name, "", launch, self.patience, self.jobs_between_starts, self.most_memory)


class ClusterWorker:
    """The actor. Ray runs `prepare` and `interrupt` beside `execute`."""

    def __init__(self, spec: ClusterSpec) -> None:
        """Describe it; `make_well` starts its server."""
        self._spec = spec
        self._worker: Worker | None = None

    def is_there(self) -> None:
        """Answers as soon as the actor has a place."""

    def make_well(self) -> str:
        """Start the server anew; why that cannot be, "" if it is well."""
        _forget_rays_threads()
        try:
            self._worker = self._worker or Worker(self._spec.here())
            self._worker.make_well()
        except (GoneError, TableError, OSError) as error:
            return f"on {socket.gethostname()}: {error}"
        return ""

    def prepare(self, job: Job) -> None:
        """See `Worker`."""
        if self._worker is not None:
            self._worker.prepare(job)

    def execute(self, job: Job) -> Outcome:
        """See `Worker`."""
        if self._worker is None:  # Ray has started this actor in the place of one that is gone
            return Outcome("fault", "the worker was started anew", restart=True)
        return self._worker.execute(job)

    def interrupt(self) -> None:
        """See `Worker`."""
        if self._worker is not None:
            self._worker.interrupt()

    def close(self) -> None:
        """End the server, and leave nothing on this machine's disk."""
        if self._worker is not None:
            self._worker.close()
        shutil.rmtree(Path(tempfile.gettempdir()) / self._spec.folder, ignore_errors=True)


def _forget_rays_threads() -> None:
    """Ray has its actors compute with one thread, which a ComfyUI would inherit. What the machine's owner set stays."""
    try:
        given = Path("/proc/self/environ").read_bytes()
    except OSError:
        return
    if f"{THREADS}=".encode() not in given:
        os.environ.pop(THREADS, None)
