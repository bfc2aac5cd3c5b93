"""How workers are reached. The driver knows no more of them than this.

A backend whose workers are on other machines gives the same futures: one call on a worker is one future, and a future
whose worker is lost ends with an exception, which the driver counts as a fault of the worker.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from .jobs import Job, Outcome
from .worker import Worker, WorkerSpec


class Backend(Protocol):
    """Workers by name. Of one worker, `execute` and `make_well` never run at the same time."""

    names: Sequence[str]

    def make_well(self, worker: str) -> "Future[None]":
        """Find or start its server, anew if it has one; ends with an exception where that cannot be."""

    def prepare(self, worker: str, job: Job) -> None:
        """Upload what a later job needs, beside the job that runs."""

    def execute(self, worker: str, job: Job) -> "Future[Outcome]":
        """Run a job."""

    def interrupt(self) -> None:
        """End all jobs that run; their outcomes are `stopped`."""

    def close(self) -> None:
        """End everything that was started."""


class LocalBackend:
    """Workers in threads of this process."""

    def __init__(self, specs: Sequence[WorkerSpec]) -> None:
        """Two threads for each: one runs its jobs, one uploads for the next."""
        self.names: Sequence[str] = [spec.name for spec in specs]
        self._workers = {spec.name: Worker(spec) for spec in specs}
        self._runs = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in self.names}
        self._uploads = {name: ThreadPoolExecutor(1, thread_name_prefix=f"{name}-uploads") for name in self.names}

    def make_well(self, worker: str) -> "Future[None]":
        """See `Backend`."""
        return self._runs[worker].submit(self._workers[worker].make_well)

    def prepare(self, worker: str, job: Job) -> None:
        """See `Backend`."""
        self._uploads[worker].submit(self._workers[worker].prepare, job)

    def execute(self, worker: str, job: Job) -> "Future[Outcome]":
        """See `Backend`."""
        return self._runs[worker].submit(self._workers[worker].execute, job)

    def interrupt(self) -> None:
        """See `Backend`."""
        for worker in self._workers.values():
            worker.interrupt()

    def close(self) -> None:
        """See `Backend`."""
        for worker in self._workers.values():
            worker.close()
        for pool in (*self._runs.values(), *self._uploads.values()):
            pool.shutdown(wait=True, cancel_futures=True)
