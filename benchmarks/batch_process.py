"""One run of `moma_batch` in a process of its own: how long, how much memory, what its journal says."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIB_IN_MB = 1024 / 1e6
LOOK_SECONDS = 0.2
Pids = Callable[[], Mapping[str, int]]
"""The processes to look at, by what they are called; asked every time, as they come and go."""


class RunError(Exception):
    """A run did not end well; the message has what it printed."""


@dataclass(frozen=True)
class Measured:
    """A process that has ended.

    Attributes:
        began: When it was started, in seconds since the epoch.
        wall_s: From its start to its end.
        cpu_s: Of its own, and of what it started and waited for.
        peak_mb: The most main memory that it held at a time, as of 0.2 s before its end; what it started is not in it.
        output: What it printed.
        samples: Per process that was looked at, (seconds since the start, MB) in order.
    """

    began: float
    wall_s: float
    cpu_s: float
    peak_mb: float
    output: str
    samples: dict[str, list[tuple[float, float]]]


def measured(
    command: Sequence[str], variables: Mapping[str, str], pids: Pids = dict, allowed: Sequence[int] = (0,)
) -> Measured:
    """Run a command to its end and look at its memory once a second.

    Args:
        pids: Further processes to look at.
        allowed: Exit statuses that are right.

    Raises:
        RunError: It ended with another one.
    """
    began, ended = time.time(), threading.Event()
    samples: dict[str, list[tuple[float, float]]] = {"driver": []}
    process = subprocess.Popen(
        command, env=dict(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )

    peak = 0.0

    def look() -> None:
        nonlocal peak
        looked, pause = began, LOOK_SECONDS / 20
        while not ended.wait(pause):
            pause = min(LOOK_SECONDS, 1.5 * pause)  # what ends at once is looked at, too
            peak = max(peak, _peak_mb(process.pid))
            if time.time() < looked + 1:
                continue
            looked = time.time()
            for name, pid in {"driver": process.pid, **pids()}.items():
                if found := held_mb(pid):
                    samples.setdefault(name, []).append((time.time() - began, found))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.time() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    looking.join()
    if process.returncode not in allowed:
        raise RunError(f"{' '.join(command)}\nended with {process.returncode}:\n{output[-4000:]}")
    return Measured(began, wall, usage.ru_utime + usage.ru_stime, peak, output, samples)


def _peak_mb(pid: int) -> float:
    """The most that a process has held; 0 if it is gone. (What `wait4` says begins with what its parent held.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * KIB_IN_MB for line in lines if line.startswith("VmHWM")), 0.0)


def held_mb(pid: int) -> float:
    """Main memory that a process holds; 0 if it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    except (OSError, IndexError):
        return 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def growth(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How memory went: MB after a tenth, a half and all of the time, and the slope of the second half in MB an hour.

    Nothing where the process did not last long enough to be looked at.
    """
    if not samples:
        return {}
    first, last = samples[0][0], samples[-1][0]

    def at(share: float) -> float:
        return next(held for when, held in samples if when >= first + share * (last - first))

    later = [(when, held) for when, held in samples if when >= (first + last) / 2]
    mean_when = sum(when for when, _ in later) / len(later)
    mean_held = sum(held for _, held in later) / len(later)
    above = sum((when - mean_when) * (held - mean_held) for when, held in later)
    below = sum((when - mean_when) ** 2 for when, _ in later)
    found = {"tenth_mb": at(0.1), "half_mb": at(0.5), "end_mb": samples[-1][1], "seconds": last - first}
    return {**found, "slope_mb_per_h": above / below * 3600 if below else 0.0}
