"""One worker: a client of one server, and the owner of its process if it is ours."""

import contextlib
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .jobs import Job, Outcome, Produced, Upload
from .pictures import BrokenPictureError, check_picture, png_texts
from .process import ComfyProcess, Launch
from .server import GoneError, RefusedError, Server

SHORTEST_WAIT, LONGEST_WAIT, SHARE = 0.01, 1.0, 0.04
"""Seconds between two looks at the history; in between, this share of what the prompt takes, usually or so far."""
RECENT, EARLY = 20, 0.75
"""The first look comes at this share of the time of the shortest of so many jobs before."""
LOST_SECONDS = 5.0
ENDED_SECONDS = 5.0
"""How long a process that ends may take to, after its connections broke."""
REMEMBERED = 4096
_MEMORY = ("OutOfMemory", "out of memory", "CUDA error", "AcceleratorError", "MemoryError")
_FULL = ("No space left on device", "not enough space on the disk", "Errno 28")


@dataclass(frozen=True)
class Patience:
    """How long a worker waits, in seconds.

    Attributes:
        silence: For a server that does not answer while a prompt runs.
        back: For a server to answer (again), when there is no process of ours to start.
    """

    silence: float = 120.0
    back: float = 300.0


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is: the address of a server, or how to start one."""

    name: str
    url: str = ""
    launch: Launch | None = None
    patience: Patience = Patience()
    jobs_between_starts: int = 0
    most_memory: int = 0


class Worker:
    """Runs jobs one after another on its server. `prepare` may run beside `execute`, all else not."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Describe it; `make_well` starts or finds its server."""
        self.spec = spec
        self._process = ComfyProcess(spec.launch) if spec.launch else None
        self._server = Server(spec.url) if spec.url else None
        self._uploaded: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._interrupted, self._closed = threading.Event(), threading.Event()
        self._versions: dict[str, str] = {}
        self._jobs = 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def make_well(self) -> None:
        """Start our process anew, or wait for the server to answer.

        Raises:
            GoneError: There is no server.
        """
        with self._lock:
            self._uploaded.clear()
        self._jobs = 0
        if self._process is not None:
            self._server = Server(self._process.start(self._closed.is_set))
        assert self._server is not None
        deadline = time.monotonic() + self.spec.patience.back
        while True:
            try:
                self._versions = self._server.versions()
                return
            except GoneError:
                if time.monotonic() > deadline or self._closed.wait(0.5):
                    raise

    def prepare(self, job: Job) -> None:
        """Upload what a job needs; what goes wrong here shows in `execute`."""
        with contextlib.suppress(GoneError, OSError):
            self._upload(job.uploads)

    def execute(self, job: Job) -> Outcome:
        """Run a job to its end; never raises."""
        start = time.monotonic()
        try:
            outcome = self._execute(job)
        except RefusedError as error:
            outcome = Outcome("refused", str(error), error.node)
        except GoneError as error:
            self._cancel(job)
            outcome = self._died(self._why_gone(error))
        except BrokenPictureError as error:
            outcome = Outcome("fault", f"a file came broken: {error}")
        except OSError as error:
            outcome = Outcome("failed", f"an input cannot be read: {error}")
        self._jobs += 1
        restart = outcome.restart or self._is_due()
        seconds = round(time.monotonic() - start, 3)
        return Outcome(outcome.status, outcome.message, outcome.node, outcome.files, seconds, restart, self._versions)

    def interrupt(self) -> None:
        """End the job that runs, as soon as may be; from another thread."""
        self._interrupted.set()

    def close(self) -> None:
        """End our process. From another thread, also while a job runs."""
        self._closed.set()
        self._interrupted.set()
        if self._process is not None:
            self._process.stop()

    def _execute(self, job: Job) -> Outcome:
        server = self._server
        if server is None:
            raise GoneError("there is no server")
        known = job.resumed and (server.history(job.prompt_id) is not None or server.is_queued(job.prompt_id))
        if not known:
            self._upload(job.uploads)
            server.queue(job.graph, job.prompt_id, job.mark)
        found = self._wait(server, job)
        if isinstance(found, Outcome):
            return found
        outcome = _read_history(found) or self._collect(server, job, found)
        with contextlib.suppress(GoneError):
            server.forget(job.prompt_id)
        return outcome

    def _upload(self, uploads: tuple[Upload, ...]) -> None:
        assert self._server is not None
        for upload in uploads:
            with self._lock:
                if upload.name in self._uploaded:
                    self._uploaded.move_to_end(upload.name)
                    continue
            self._server.upload(upload.name, upload.read())
            with self._lock:
                self._uploaded[upload.name] = None
                while len(self._uploaded) > REMEMBERED:
                    self._uploaded.popitem(last=False)

    def _wait(self, server: Server, job: Job) -> dict[str, Any] | Outcome:
        """What the history says once the prompt has ended, or why we do not wait any longer."""
        start = heard = looked = time.monotonic()
        usual = statistics.median(self._recent) if self._recent else 0.0
        pause = EARLY * min(self._recent, default=0.0)
        while True:
            if self._interrupted.wait(min(max(SHORTEST_WAIT, pause), LONGEST_WAIT)):
                self._cancel(job)
                return Outcome("stopped", "stopped")
            now = time.monotonic()
            pause = SHARE * max(usual, now - start)
            try:
                if found := server.history(job.prompt_id):
                    self._recent.append(time.monotonic() - start)
                    return found
                if now - looked > LOST_SECONDS:
                    if not server.is_queued(job.prompt_id) and not server.history(job.prompt_id):
                        return Outcome("fault", "the server does not know the prompt any more: it was started anew")
                    looked = now
                heard = time.monotonic()
            except GoneError as error:
                ended = self._process is not None and not self._process.is_running()
                if ended or now - heard > self.spec.patience.silence or "refused" in str(error):
                    return self._died(self._why_gone(error))
            if now - start > job.timeout:
                self._cancel(job)
                message = f"the prompt did not end within {job.timeout:.0f} s (--timeout): the server counts as hung"
                return Outcome("fault", message, restart=True)

    def _why_gone(self, error: GoneError) -> str:
        """That our process ended, where it did, tells more than what the connection saw of it."""
        if self._process is not None and not self._process.is_running(ENDED_SECONDS):
            return f"ComfyUI ended:\n{self._process.log_end()}"
        return str(error)

    def _died(self, message: str) -> Outcome:
        if self._interrupted.is_set():
            return Outcome("stopped", "stopped")
        return Outcome("fault", message, restart=True)

    def _cancel(self, job: Job) -> None:
        """Have the server not go on with it, if it still can be told."""
        if self._server is not None:
            with contextlib.suppress(GoneError):
                Server(self._server.url, 5).cancel(job.prompt_id)

    def _collect(self, server: Server, job: Job, found: Mapping[str, Any]) -> Outcome:
        """Fetch what the prompt made, in the order in which the graph has the nodes."""
        order = {name: place for place, name in enumerate(job.graph)}
        outputs = sorted(found.get("outputs", {}).items(), key=lambda item: order.get(item[0], len(order)))
        kinds = ("moma_subjects", "moma_pictures") if job.encodes else ("images",)
        said = (file for _, node in outputs for kind in kinds for file in node.get(kind, []))
        # Subjects of one picture name the same file of it.
        files = list({tuple(sorted(file.items())): file for file in said if file.get("type") == "output"}.values())
        if not files:
            return Outcome("failed", "the prompt ended without a file")
        produced = [Produced(str(file["filename"]), server.output(file)) for file in files]
        self._drop(files)
        for one in produced:
            if not one.content:
                raise BrokenPictureError(f"{one.name} is empty")
            if not job.encodes:
                check_picture(one.content)
                _check_mark(one, job)
        return Outcome("ok", files=tuple(produced))

    def _drop(self, files: list[dict[str, str]]) -> None:
        """Delete what was fetched from a server of our own: the run's folder keeps it, and needs no second copy."""
        if self.spec.launch is None:
            return
        output = (self.spec.launch.folder / "output").resolve()
        for file in files:
            path = output / str(file["subfolder"]) / str(file["filename"])
            if path.resolve().is_relative_to(output):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _is_due(self) -> bool:
        """Whether our process has done or holds so much that it is to be started anew."""
        if self._process is None:
            return False
        spec = self.spec
        if spec.jobs_between_starts and self._jobs >= spec.jobs_between_starts:
            return True
        return bool(spec.most_memory) and self._process.memory() > spec.most_memory


def _read_history(found: Mapping[str, Any]) -> Outcome | None:
    """Why a prompt gave nothing; None if it ended well."""
    status = found.get("status") or {}
    for message in status.get("messages", []):
        kind, data = message[0], message[1]
        if kind == "execution_error":
            text = f"{data.get('exception_type')}: {data.get('exception_message')}".strip()
            node = str(data.get("node_type", ""))
            if any(mark in text for mark in _FULL):
                return Outcome("full", text, node)
            if any(mark in text for mark in _MEMORY):
                return Outcome("fault", text, node, restart=True)
            return Outcome("failed", str(data.get("exception_message", "")).strip(), node)
        if kind == "execution_interrupted":
            return Outcome("fault", "somebody interrupted the prompt on the server")
    if status.get("status_str") == "error":
        return Outcome("failed", "the prompt failed, and the server does not say why")
    return None


def _check_mark(file: Produced, job: Job) -> None:
    """A picture that says whose it is must be this job's."""
    text = png_texts(file.content).get("moma_batch")
    if text is not None and f'"{job.keys[0]}"' not in text:
        raise BrokenPictureError(f"{file.name} is another row's: {text[:200]}")
