"""What is on the disk when: several results are written at a time, and the journal is synced for all of them."""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.newest


def test_two_subjects_of_one_photograph_are_written_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    from moma_batch.jobs import Produced
    from moma_batch.results import publish
    from moma_batch.tasks import Task

    calls, both, real = itertools.count(), threading.Barrier(2), os.fsync

    def fsync(handle: int) -> None:
        if next(calls) < 2:
            both.wait(600)  # both have begun the file that they share
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    tasks = [Task(no, f"encoding:{no}", 1, "", f"{no}" * 64, True, {}, "running", 0, "", {}) for no in (1, 2)]
    shared = Produced("ab.pictures", b"photo")
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda task: publish(tmp_path, task, (shared, Produced("x", task.key.encode()))), tasks))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == sorted(
        ["ab.pictures", *(f"{task.key}.safetensors" for task in tasks)]
    )
    assert [files[0]["name"] for files in said] == ["subjects/ab/ab.pictures"] * 2
    assert (tmp_path / "subjects" / "ab" / "ab.pictures").read_bytes() == b"photo"


def test_the_journal_is_synced_once_for_all_that_ended(tmp_path: Path, monkeypatch: Any) -> None:
    from moma_batch.journal import Journal, entries

    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(len(list(entries(tmp_path)))))
    journal = Journal(tmp_path)
    journal.add("begin", {"task": "a"}, kept=False)
    journal.sync()
    assert not synced, "nobody needs to know of a begin after the machine has died"
    for name in "abc":
        journal.add("end", {"task": name})
    journal.sync()
    journal.sync()
    assert synced == [4]
    journal.add("end", {"task": "d"})
    journal.close()
    assert synced == [4, 5]
