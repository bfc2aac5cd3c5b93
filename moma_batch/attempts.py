"""What a worker is given: a job, and the tasks whose results it makes."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .graphs import graph_of, uploads_of
from .index import Index
from .jobs import Job, Outcome, Produced
from .phases import SAVER, TOGETHER, are_alike, together, with_subjects
from .results import PICTURES, subject_uploads
from .tasks import Task
from .workflow import with_prefix

_STEM = 32
"""So many digits of a task's key begin the names of its files on a server."""


@dataclass(frozen=True)
class Attempt:
    """A job and its tasks: several only where subjects of one picture are encoded together."""

    tasks: tuple[Task, ...]
    job: Job

    def outcomes(self, outcome: Outcome) -> list[tuple[Task, Outcome]]:
        """Each task with its own part of what became of the job.

        An encoding has one subject, and those that were made together have one picture; else all of them have failed.
        """
        seconds = round(outcome.seconds / len(self.tasks), 3)
        if outcome.status != "ok" or not self.job.encodes:
            return [(task, replace(outcome, seconds=seconds)) for task in self.tasks]
        pictures = [file for file in outcome.files if file.name.endswith(PICTURES)]
        subjects = [[file for file in outcome.files if file.name.startswith(_stem(task))] for task in self.tasks]
        if len(pictures) > 1 or any(len(files) != 1 for files in subjects):
            count = sum(map(len, subjects))
            message = f"{len(self.tasks)} subjects were to be encoded, and the workflow gave {count}"
            failed = Outcome("failed", f"{message} of {len(pictures)} pictures", seconds=seconds)
            return [(task, failed) for task in self.tasks]
        parts: list[tuple[Produced, ...]] = [(*files, *pictures) for files in subjects]
        return [
            (task, replace(outcome, files=part, seconds=seconds)) for task, part in zip(self.tasks, parts, strict=True)
        ]


def _stem(task: Task) -> str:
    return task.key[:_STEM]


@dataclass(frozen=True)
class Attempts:
    """Makes attempts of a run's tasks; `timeout` as in `Job`."""

    folder: Path
    run_id: str
    index: Index
    timeout: float

    def of(self, task: Task) -> Attempt:
        """At a task that is running, and at others of its picture that are running from now on."""
        tasks = [task]
        if task.encodes and not task.alone:
            graph = graph_of(task.spec)
            for other in self.index.beside(task.no, TOGETHER - 1):
                if are_alike(graph, graph_of(other.spec)):
                    tasks.append(self.index.start(other.no))
        return self._of(tasks, str(uuid.uuid4()), False)

    def again(self, numbers: Sequence[int], prompt_id: str) -> Attempt | None:
        """At what an earlier driver had begun as this prompt, as far as it still is to be done."""
        tasks = [self.index.by_number(no) for no in numbers]
        started = [self.index.start(task.no) for task in tasks if task.state == "pending"]
        return self._of(started, prompt_id, True) if started else None

    def _of(self, tasks: list[Task], prompt_id: str, resumed: bool) -> Attempt:
        first, graph = tasks[0], graph_of(tasks[0].spec)
        uploads = list(uploads_of(first.spec, graph))
        folder = f"moma_batch/{self.run_id[:8]}/{first.key[:3]}"
        prefixes = [f"{folder}/{_stem(task)}-{prompt_id[:8]}" for task in tasks]
        if len(tasks) > 1:
            graph = together([graph_of(task.spec) for task in tasks], prefixes)
        else:
            names = {}
            for encoding in self.index.encodings_of(first.no):
                names[encoding.key], files = subject_uploads(self.folder, encoding)
                uploads += files
            graph = with_prefix(with_subjects(graph, names), prefixes[0])
            if first.encodes:
                graph[SAVER]["inputs"]["filename_prefix"] = prefixes[0]
        mark, keys = {"id": first.id, "key": first.key}, tuple(task.key for task in tasks)
        more = (tuple(uploads), first.encodes, mark, self.timeout, resumed)
        return Attempt(tuple(tasks), Job(first.id, keys, first.attempts + 1, prompt_id, graph, *more))
