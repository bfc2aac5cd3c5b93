"""Workers on the machines of a Ray cluster. Ray finds the machines, places the workers and notices when one is lost.

Ray is imported here alone, and only for `--address`.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .backend import Backend
from .cluster_worker import ClusterSpec, ClusterWorker, SentUpload
from .jobs import Job, Outcome, Upload
from .process import GRACE_SECONDS
from .server import GoneError

MISSING = (
    "--address needs Ray in this Python: make an environment for it (not ComfyUI's), `pip install ray` there, and give "
    "this command with that environment's Python."
)
TOKEN = (
    "the cluster wants a token and there is none here. `ray get-auth-token --generate` makes one in ~/.ray/auth_token; "
    "copy that file to every machine before `ray start`, or set RAY_AUTH_TOKEN. For a cluster without tokens set "
    "RAY_AUTH_MODE=disabled."
)
KEPT_BYTES = 512 << 20
"""How much of the inputs the driver keeps in Ray's object store, beside what is on its way."""
GROUPS = {"runs": 1, "uploads": 1, "control": 2}
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would kill the guard before the guard can end ComfyUI.
    "RAY_kill_child_processes_on_worker_exit": "0",
    # Where Ray is started here: its workers, and ComfyUI with them, would give way to every other program.
    "RAY_worker_niceness": "0",
}


def connect(address: str) -> ModuleType:
    """Join a cluster; Ray itself.

    Args:
        address: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for a new one on this machine.

    Raises:
        ValueError: It cannot be joined; the message says why.
    """
    os.environ.update(VARIABLES)
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # older releases do not look at it
    try:
        import ray
    except ImportError as error:
        raise ValueError(MISSING) from error
    more: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        with tempfile.TemporaryDirectory(prefix="moma_batch-code-") as code:
            here = Path(__file__).parent
            shutil.copytree(here, Path(code) / here.name, ignore=shutil.ignore_patterns("__pycache__"))
            # Not `py_modules`: with those a worker would first look below the driver's own folders.
            given = {"working_dir": code, "env_vars": VARIABLES}
            ray.init(address, runtime_env=given, log_to_driver=False, logging_level="ERROR", **more)
    except Exception as error:  # of many classes, some of them Ray's own internals
        raise ValueError(f"--address {address}: {_reason(error)}") from error
    return ray


def _reason(error: Exception) -> str:
    """Why a cluster could not be joined, in one sentence where it is known."""
    text = str(error)
    if type(error).__name__ == "AuthenticationError" or "couldn't find an authentication token" in text:
        return TOKEN if "no authentication token" in text or "couldn't find" in text else text.split(". ")[0]
    if "ersion mismatch" in text:
        words = " ".join(text.split())
        return f"this Python and the cluster need the same releases of Ray and Python. {words}"
    return f"no Ray cluster can be joined: {' '.join(text.split())[:400] or type(error).__name__}"


class Sender:
    """Puts files into Ray's object store, each once while it is in use."""

    def __init__(self, put: Callable[[bytes], Any], most: int = KEPT_BYTES) -> None:
        """Keep at most so many bytes; what is on its way is held by Ray."""
        self._put, self._most = put, most
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def send(self, upload: Upload) -> SentUpload:
        """What goes to the worker; its name tells its content, so what was sent once is not read again."""
        with self._lock:
            if upload.name in self._kept:
                self._kept.move_to_end(upload.name)
                return SentUpload(upload.name, upload.path, self._kept[upload.name][0])
            try:
                content = upload.read()
            except OSError as error:
                return SentUpload(upload.name, upload.path, error)
            self._kept[upload.name] = (self._put(content), len(content))
            while sum(size for _, size in self._kept.values()) > self._most and len(self._kept) > 1:
                self._kept.popitem(last=False)
            return SentUpload(upload.name, upload.path, self._kept[upload.name][0])


class RemoteWorker:
    """Stands for a `ClusterWorker`; see `backend.AnyWorker`."""

    def __init__(self, ray: ModuleType, spec: ClusterSpec, sender: Sender) -> None:
        """Ask Ray for the actor; it may come at once, or when there is room for it."""
        self._ray, self._spec, self._sender = ray, spec, sender
        self._closed = threading.Event()
        self._was_there = False
        self._actor = (
            ray.remote(concurrency_groups=GROUPS)(ClusterWorker)
            .options(
                num_gpus=1 if spec.has_card else 0,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            .remote(spec)
        )

    def make_well(self) -> None:
        """Wait for the actor, here or on the machine where Ray starts it anew, and for its server.

        Raises:
            GoneError: Neither came in time, or the server cannot be started.
        """
        deadline = time.monotonic() + self._spec.patience.back
        while True:
            try:
                message = self._answer(self._call("runs", "make_well"), deadline)
            except self._ray.exceptions.RayError as error:
                if time.monotonic() > deadline or self._closed.wait(0.3):
                    raise GoneError(f"the cluster has no place for the worker: {_first_line(error)}") from error
                continue
            self._was_there = True
            if message:
                raise GoneError(message)
            return

    def _answer(self, reference: Any, deadline: float) -> Any:
        """What a call gives. Until the actor has answered once it may be without a place, and the wait has an end."""
        while not self._closed.is_set():
            done, _ = self._ray.wait([reference], timeout=0.5)
            if done:
                return self._ray.get(reference)
            if not self._was_there and time.monotonic() > deadline and not self._is_placed():
                free = self._ray.available_resources()
                kind = "GPU" if self._spec.has_card else "CPU"
                raise GoneError(f"the cluster has no place for the worker: {free.get(kind, 0):.0f} {kind} are free")
        raise GoneError("stopped")

    def _is_placed(self) -> bool:
        done, _ = self._ray.wait([self._call("control", "is_there")], timeout=5)
        return bool(done)

    def prepare(self, job: Job) -> None:
        """See `AnyWorker`."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._call("uploads", "prepare", self._sent(job)))

    def execute(self, job: Job) -> Outcome:
        """See `AnyWorker`; a lost actor is a fault."""
        try:
            found: Outcome = self._ray.get(self._call("runs", "execute", self._sent(job)))
            return found
        except self._ray.exceptions.RayError as error:
            return Outcome("fault", f"the worker is gone: {_first_line(error)}", restart=True)

    def interrupt(self) -> None:
        """See `AnyWorker`."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._call("control", "interrupt")

    def close(self) -> None:
        """See `AnyWorker`."""
        self._closed.set()
        with contextlib.suppress(self._ray.exceptions.RayError):
            if self._was_there:
                self._ray.wait([self._call("control", "close")], timeout=GRACE_SECONDS)
            self._ray.kill(self._actor, no_restart=True)

    def _call(self, group: str, name: str, *arguments: Any) -> Any:
        return getattr(self._actor, name).options(concurrency_group=group).remote(*arguments)

    def _sent(self, job: Job) -> Job:
        return dataclasses.replace(job, uploads=tuple(self._sender.send(upload) for upload in job.uploads))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cards_of(ray: ModuleType) -> int:
    """How many cards the machines of the cluster have."""
    return int(ray.cluster_resources().get("GPU", 0))


def cluster_backend(ray: ModuleType, count: int | None, describe: Callable[[int, bool], ClusterSpec]) -> Backend:
    """Workers on a cluster.

    Args:
        count: How many; None for one on each card, or one where there is none.
        describe: Gives the worker of a number from 1, with or without a card.
    """
    cards, sender = cards_of(ray), Sender(ray.put)
    specs = [describe(number, cards > 0) for number in range(1, (count or cards or 1) + 1)]
    workers: Mapping[str, RemoteWorker] = {spec.name: RemoteWorker(ray, spec, sender) for spec in specs}
    return Backend(workers, ray.shutdown)
