"""The loop: gives tasks to workers, publishes what they make, and decides what a failure means."""

import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .attempts import Attempt, Attempts
from .backend import Backend, is_plain, outcome_of
from .index import Index
from .jobs import Outcome
from .journal import Journal
from .results import Written, published, why_full
from .tasks import APART, Task

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
    next: Attempt | None = None


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
        self._attempts = Attempts(self.folder, self.run_id, self.index, self.limits.timeout)
        self._running: dict[Future[Any], tuple[Place, Attempt | None]] = {}
        self._resumed: dict[str, dict[str, list[int]]] = {}
        self._interrupted = False
        self._disk = ThreadPoolExecutor(WRITERS, thread_name_prefix="disk")

    def stop(self) -> None:
        """Ctrl-C: the first one lets what runs end, the second one ends it."""
        self.stops += 1

    def run(self) -> int:
        """Do all tasks that can be done; the exit status."""
        try:
            for no, begun in self.index.begun():
                prompts = self._resumed.setdefault(str(begun.get("worker")), {})
                prompts.setdefault(str(begun["prompt_id"]), []).append(no)
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
            for future, place, attempt in ended:  # first new work for the workers, then what they made is written
                if attempt is not None and self._may_start() and is_plain(future):
                    self._give(place)
            self._write([(place, attempt, outcome_of(future)) for future, place, attempt in ended if attempt])
            for future, place, attempt in ended:
                if attempt is None:
                    self._made_well(place, future)
            self.tick()

    def _write(self, ended: "list[tuple[Place, Attempt, Outcome]]") -> None:
        """Publish what has been made, all at once: a disk may take its time for each file that must be on it."""
        parts = [attempt.outcomes(outcome) for _, attempt, outcome in ended]
        written = self._disk.map(lambda one: published(self.folder, *one), [one for part in parts for one in part])
        for (place, attempt, outcome), part in zip(ended, parts, strict=True):
            self._ended(place, attempt, outcome, [(*one, next(written)) for one in part])
        try:
            self.journal.sync()
        except OSError as error:
            self.full = why_full(error)

    def _goes_on(self) -> bool:
        """Whether something runs, or will once a worker is well; nobody waits for a worker without rows for it."""
        if any(attempt is not None for _, attempt in self._running.values()):
            return True
        if not self._running or not self._may_start():
            return False
        kinds = (False, True) if self.limits.encodes is None else (self.limits.encodes,)
        return any(self.index.counts(kind).get(state) for kind in kinds for state in ("pending", "running"))

    def _may_start(self) -> bool:
        return not self.stops and not self.full

    def _is_busy(self, place: Place) -> bool:
        return any(other is place for other, _ in self._running.values())

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if not self.full and free < self.limits.keep_free:
            self.full = (
                f"{free >> 20} MB are free in {self.folder}, and {self.limits.keep_free >> 20} MB are to stay free"
            )

    def _make_well(self, place: Place) -> None:
        place.well = False
        self._running[self.backend.make_well(place.name)] = (place, None)

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
        attempt = place.next or self._choose(place) or self._kept_by_others()
        place.next = None
        if attempt is None:
            return
        job = attempt.job
        for task in attempt.tasks:
            begun = {"task": task.id, "key": task.key, "worker": place.name, "prompt_id": job.prompt_id}
            self.journal.add("begin", begun, kept=False)
        self._running[self.backend.execute(place.name, job)] = (place, attempt)
        place.next = self._choose(place)
        if place.next is not None:
            self.backend.prepare(place.name, place.next.job)

    def _choose(self, place: Place) -> Attempt | None:
        if waiting := self._resumed.get(place.name):
            prompt_id = next(iter(waiting))
            if attempt := self._attempts.again(waiting.pop(prompt_id), prompt_id):
                return attempt
        alone = sum(not other.retired for other in self._places.values()) < 2
        found = self.index.take(place.name, alone, self.limits.encodes)
        return self._attempts.of(found) if found else None

    def _kept_by_others(self) -> Attempt | None:
        """When nothing else is left: what another worker was to do next, and may as well be done elsewhere."""
        for other in self._places.values():
            if other.next is not None and not other.next.job.resumed and other.next.job.attempt == 1:
                found, other.next = other.next, None
                return found
        return None

    def _take_back(self, only: Place | None = None) -> None:
        """What was chosen and has not begun is to be done by whoever comes first."""
        for place in self._places.values() if only is None else (only,):
            for task in place.next.tasks if place.next is not None else ():
                self.index.put_back(task.no)
            place.next = None

    def _ended(
        self, place: Place, attempt: Attempt, outcome: Outcome, parts: "list[tuple[Task, Outcome, Written]]"
    ) -> None:
        apart = len(parts) > 1 and parts[0][1].status in ("refused", "failed", "fault")
        for task, own, files in parts:
            entry: dict[str, Any] = {"task": task.id, "key": task.key, "attempt": attempt.job.attempt}
            entry |= {"status": APART if apart else own.status, "worker": place.name}
            entry |= {"seconds": own.seconds, "at": round(time.time(), 3)}
            entry |= {"message": own.message, "node": own.node} if own.message else {}
            try:
                if isinstance(files, OSError):
                    raise files
                self._settle(place, task, own, {**entry, "files": files} if files else entry)
            except OSError as error:
                self.full = why_full(error)
                self.index.put_back(task.no)
        if apart:
            self._set_apart(place, parts[0][0], parts[0][1], len(parts))
        if outcome.restart and not place.retired and not self.stops:
            self._take_back(place)
            self._make_well(place)

    def _set_apart(self, place: Place, first: Task, outcome: Outcome, count: int) -> None:
        """Nobody knows for which of the encodings a prompt failed: it is charged to none, and each is tried alone."""
        said = f"{outcome.node and outcome.node + ': '}{outcome.message}"
        self.say(f"{count} subjects of one picture were not encoded together, and are one by one: {said}")
        if outcome.status == "fault":
            self._count(place, first, outcome)

    def _settle(self, place: Place, task: Task, outcome: Outcome, entry: dict[str, Any]) -> None:
        if entry["status"] == APART:
            self.journal.add("end", entry)
            self.index.set_alone(task.no)
            self.index.put_back(task.no)
        elif outcome.status == "ok":
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
        self._count(place, task, outcome)

    def _count(self, place: Place, task: Task, outcome: Outcome) -> None:
        """A worker on which one row after another fails gets no more."""
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
