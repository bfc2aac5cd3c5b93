"""The loop: gives tasks to workers, publishes what they make, and decides what a failure means."""

import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .backend import Backend, is_plain, outcome_of
from .graphs import graph_of, uploads_of
from .index import Index
from .jobs import Job, Outcome
from .journal import Journal
from .phases import SAVER, with_subjects
from .results import Written, published, subject_uploads, why_full
from .tasks import Task
from .workflow import with_prefix

OK, SOME_FAILED, USAGE, DISK_FULL, NO_WORKERS, STOPPED = 0, 1, 2, 3, 4, 130
"""What the command's exit status means."""
MOST_ATTEMPTS = 3
MOST_ROWS = 3
"""A worker on which so many rows in a row fail by a fault gets no more."""
STARTS = 2
WRITERS = 8
"""So many results are written at a time."""
TICK = 0.2


@dataclass(frozen=True)
class Limits:
    """What the user may set: seconds for a prompt, bytes that stay free, which phase alone."""

    timeout: float = 1800.0
    keep_free: int = 256 << 20
    encodes: bool | None = None


@dataclass
class Place:
    """A worker as the driver sees it."""

    name: str
    well: bool = False
    retired: bool = False
    failed_starts: int = 0
    failed_rows: set[str] = field(default_factory=set)
    next: tuple[Task, Job] | None = None


@dataclass
class Driver:
    """One run over an index. `say` gets a line for the user, `tick` is called several times a second."""

    folder: Path
    run_id: str
    index: Index
    journal: Journal
    backend: Backend
    limits: Limits
    say: Callable[[str], None]
    tick: Callable[[], None] = lambda: None
    stops: int = 0
    full: str = ""

    def __post_init__(self) -> None:
        """Nothing runs yet."""
        self._places = {name: Place(name) for name in self.backend.names}
        self._running: dict[Future[Any], tuple[Place, Task | None, Job | None]] = {}
        self._resumed: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self._interrupted = False
        self._disk = ThreadPoolExecutor(WRITERS, thread_name_prefix="disk")

    def stop(self) -> None:
        """Ctrl-C: the first one lets what runs end, the second one ends it."""
        self.stops += 1

    def run(self) -> int:
        """Do all tasks that can be done; the exit status."""
        try:
            for no, begun in self.index.begun():
                self._resumed.setdefault(str(begun.get("worker")), []).append((no, begun))
            for place in self._places.values():
                self._make_well(place)
            self._loop()
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            self.full = str(error)
        finally:
            self.backend.close()
            self._disk.shutdown()
        return self._status()

    def _loop(self) -> None:
        while True:
            self._check_space()
            if self._may_start():
                for place in self._places.values():
                    if place.well and not self._is_busy(place):
                        self._give(place)
            else:
                self._take_back()
            if not self._goes_on():
                return
            if self.stops > 1 and not self._interrupted:
                self._interrupted = True
                self.backend.interrupt()
            done, _ = wait(self._running, TICK, FIRST_COMPLETED)
            ended = [(future, *self._running.pop(future)) for future in done]
            for future, place, task, _ in ended:  # first new work for the workers, then what they made is written
                if task is not None and self._may_start() and is_plain(future):
                    self._give(place)
            self._write([(place, t, job, outcome_of(future)) for future, place, t, job in ended if t and job])
            for future, place, task, _ in ended:
                if task is None:
                    self._made_well(place, future)
            self.tick()

    def _write(self, ended: "list[tuple[Place, Task, Job, Outcome]]") -> None:
        """Publish what has been made, all at once: a disk may take its time for each file that must be on it."""
        written = self._disk.map(lambda one: published(self.folder, one[1], one[3]), ended)
        for (place, task, job, outcome), files in zip(ended, list(written), strict=True):
            self._ended(place, task, job, outcome, files)
        try:
            self.journal.sync()
        except OSError as error:
            self.full = why_full(error)

    def _goes_on(self) -> bool:
        """Whether something runs, or will once a worker is well; nobody waits for a worker without rows for it."""
        if any(task is not None for _, task, _ in self._running.values()):
            return True
        if not self._running or not self._may_start():
            return False
        kinds = (False, True) if self.limits.encodes is None else (self.limits.encodes,)
        return any(self.index.counts(kind).get(state) for kind in kinds for state in ("pending", "running"))

    def _may_start(self) -> bool:
        return not self.stops and not self.full

    def _is_busy(self, place: Place) -> bool:
        return any(other is place for other, _, _ in self._running.values())

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if not self.full and free < self.limits.keep_free:
            self.full = (
                f"{free >> 20} MB are free in {self.folder}, and {self.limits.keep_free >> 20} MB are to stay free"
            )

    def _make_well(self, place: Place) -> None:
        place.well = False
        self._running[self.backend.make_well(place.name)] = (place, None, None)

    def _made_well(self, place: Place, future: "Future[None]") -> None:
        error = future.exception()
        if error is None:
            place.well, place.failed_starts = True, 0
            return
        place.failed_starts += 1
        if place.failed_starts < STARTS and self._may_start():
            self._make_well(place)
        elif self._may_start():
            self._retire(place, str(error))

    def _retire(self, place: Place, why: str) -> None:
        place.well, place.retired = False, True
        self._take_back(place)
        self.index.release(place.name)
        self.journal.add("retired", {"worker": place.name, "message": why}, kept=False)
        self.say(f"{place.name} gets no more rows: {why}")

    def _give(self, place: Place) -> None:
        """The next job for a worker, and the one after that to be prepared for."""
        task, job = place.next or self._choose(place) or self._kept_by_others() or (None, None)
        place.next = None
        if task is None or job is None:
            return
        begun = {"task": task.id, "key": task.key, "worker": place.name, "prompt_id": job.prompt_id}
        self.journal.add("begin", begun, kept=False)
        self._running[self.backend.execute(place.name, job)] = (place, task, job)
        place.next = self._choose(place)
        if place.next is not None:
            self.backend.prepare(place.name, place.next[1])

    def _choose(self, place: Place) -> tuple[Task, Job] | None:
        if waiting := self._resumed.get(place.name):
            no, begun = waiting.pop(0)
            task = self.index.by_number(no)
            if task.state == "pending":
                return self._with_job(self.index.take_begun(no), str(begun["prompt_id"]))
        alone = sum(not other.retired for other in self._places.values()) < 2
        found = self.index.take(place.name, alone, self.limits.encodes)
        return self._with_job(found) if found else None

    def _kept_by_others(self) -> tuple[Task, Job] | None:
        """When nothing else is left: what another worker was to do next, and may as well be done elsewhere."""
        for other in self._places.values():
            if other.next is not None and not other.next[1].resumed and other.next[1].attempt == 1:
                found, other.next = other.next, None
                return found
        return None

    def _with_job(self, task: Task, resumed: str = "") -> tuple[Task, Job]:
        graph = graph_of(task.spec)
        uploads = list(uploads_of(task.spec, graph))
        names = {}
        for encoding in self.index.encodings_of(task.no):
            names[encoding.key], files = subject_uploads(self.folder, encoding)
            uploads += files
        prompt_id = resumed or str(uuid.uuid4())
        prefix = f"moma_batch/{self.run_id[:8]}/{task.key[:3]}/{task.key[:32]}-{prompt_id[:8]}"
        graph = with_prefix(with_subjects(graph, names), prefix)
        if task.encodes:
            graph[SAVER]["inputs"]["filename_prefix"] = prefix
        mark, attempt = {"id": task.id, "key": task.key}, task.attempts + 1
        sent, encodes, timeout = tuple(uploads), task.encodes, self.limits.timeout
        job = Job(task.id, task.key, attempt, prompt_id, graph, sent, encodes, mark, timeout, bool(resumed))
        return task, job

    def _take_back(self, only: Place | None = None) -> None:
        """What was chosen and has not begun is to be done by whoever comes first."""
        for place in self._places.values() if only is None else (only,):
            if place.next is not None:
                self.index.put_back(place.next[0].no)
                place.next = None

    def _ended(self, place: Place, task: Task, job: Job, outcome: Outcome, files: Written) -> None:
        entry: dict[str, Any] = {"task": task.id, "key": task.key, "attempt": job.attempt, "status": outcome.status}
        entry |= {"worker": place.name, "seconds": outcome.seconds, "at": round(time.time(), 3)}
        entry |= {"message": outcome.message, "node": outcome.node} if outcome.message else {}
        try:
            if isinstance(files, OSError):
                raise files
            self._settle(place, task, outcome, {**entry, "files": files} if files else entry)
        except OSError as error:
            self.full = why_full(error)
            self.index.put_back(task.no)
        if outcome.restart and not place.retired and not self.stops:
            self._take_back(place)
            self._make_well(place)

    def _settle(self, place: Place, task: Task, outcome: Outcome, entry: dict[str, Any]) -> None:
        if outcome.status == "ok":
            entry |= {"versions": outcome.versions}
            self.journal.add("end", entry)
            self.index.set_state(task.no, "ok", "", entry)
            place.failed_rows.clear()
        elif outcome.status in ("refused", "failed"):
            self.journal.add("end", entry)
            self.index.set_state(task.no, outcome.status, outcome.message, entry)
            self.say(f"{task.id}: {outcome.status}: {outcome.node and outcome.node + ': '}{outcome.message}")
        elif outcome.status == "fault":
            self._charge(place, task, outcome, entry)
        else:
            if outcome.status == "full":
                self.full = f"{place.name}: {outcome.message}"
            self.index.put_back(task.no)
            self.journal.add("end", entry, kept=False)

    def _charge(self, place: Place, task: Task, outcome: Outcome, entry: dict[str, Any]) -> None:
        attempts = self.index.charge(task.no, place.name)
        self.say(f"{task.id}: attempt {attempts} of {MOST_ATTEMPTS} on {place.name}: {outcome.message}")
        self.journal.add("end", entry)
        if attempts >= MOST_ATTEMPTS:
            said = {**entry, "status": "poison"}
            self.journal.add("end", said)
            self.index.set_state(task.no, "poison", f"failed {attempts} times: {outcome.message}", said)
        else:
            self.index.put_back(task.no, last=True)
        place.failed_rows.add(task.id)
        if len(place.failed_rows) >= MOST_ROWS:
            self._retire(place, f"{MOST_ROWS} rows in a row failed on it; the last: {outcome.message}")

    def _status(self) -> int:
        states = self.index.counts(False)
        if self.full:
            self.say(f"Stopped: the disk is full. {self.full}. Make room and give the same command again.")
            return DISK_FULL
        if self.stops:
            return STOPPED
        left = states.get("pending", 0) + states.get("running", 0)
        if left and self.limits.encodes is not True:
            self.say(f"{left} rows are left and no worker is. Give the same command again once there are servers.")
            return NO_WORKERS
        ended_badly = any(states.get(state) for state in ("invalid", "refused", "failed", "poison"))
        return SOME_FAILED if ended_badly else OK
