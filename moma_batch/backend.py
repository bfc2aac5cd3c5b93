"""How workers are reached. The driver knows no more of them than this.

A worker may be in this process, or stand for one on another machine. One call on a worker is one future, and a future
whose worker is lost ends with an exception or as a `fault`, which the driver counts as a fault of the worker.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from .jobs import Job, Outcome


class AnyWorker(Protocol):
    """What `worker.Worker` does, here or elsewhere; every call waits for its end."""

    def make_well(self) -> None:
        """Find or start its server, anew if it has one.

        Raises:
            GoneError: There is none.
        """

    def prepare(self, job: Job) -> None:
        """Upload what a later job needs, beside the job that runs."""

    def execute(self, job: Job) -> Outcome:
        """Run a job."""

    def interrupt(self) -> None:
        """End the job that runs; its outcome is `stopped`."""

    def close(self) -> None:
        """End everything that was started."""


class Backend:
    """Workers by name. Of one worker, `execute` and `make_well` never run at the same time."""

    def __init__(self, workers: Mapping[str, AnyWorker], end: Callable[[], None] = lambda: None) -> None:
        """Two threads for each worker: one runs its jobs, one uploads for the next. `end` comes after all of them."""
        self.names: Sequence[str] = list(workers)
        self._workers, self._end = workers, end
        self._runs = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in workers}
        self._uploads = {name: ThreadPoolExecutor(1, thread_name_prefix=f"{name}-uploads") for name in workers}
        self._closing = ThreadPoolExecutor(max(1, len(workers)), thread_name_prefix="closing")

    def make_well(self, worker: str) -> "Future[None]":
        """Have its server started or found."""
        return self._runs[worker].submit(self._workers[worker].make_well)

    def prepare(self, worker: str, job: Job) -> None:
        """Have the files of a later job uploaded."""
        self._uploads[worker].submit(self._workers[worker].prepare, job)

    def execute(self, worker: str, job: Job) -> "Future[Outcome]":
        """Have a job run."""
        return self._runs[worker].submit(self._workers[worker].execute, job)

    def interrupt(self) -> None:
        """End all jobs that run; their outcomes are `stopped`."""
        for worker in self._workers.values():
            worker.interrupt()

    def close(self) -> None:
        """End everything that was started, all workers at once."""
        try:
            list(self._closing.map(lambda worker: worker.close(), self._workers.values()))
            for pool in (*self._runs.values(), *self._uploads.values(), self._closing):
                pool.shutdown(wait=True, cancel_futures=True)
        finally:
            self._end()


def outcome_of(future: "Future[Outcome]") -> Outcome:
    """What a worker says, or that there is no worker any more."""
    error = future.exception()
    return future.result() if error is None else Outcome("fault", f"the worker is gone: {error}", restart=True)


def is_plain(future: "Future[Outcome]") -> bool:
    """Whether the worker can go on at once."""
    return future.exception() is None and future.result().status == "ok" and not future.result().restart
