"""dispatch and servers: `moma_batch` on simulated ComfyUIs, which paint nothing and take the time that they are told.

They are the stand-in of the tests, which passes the same tests of the client as a ComfyUI.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from batch_process import Measured, lines_of, measured
from comfyui_source import ROOT

STAND_IN = ROOT / "tests" / "batch" / "fake_comfyui" / "main.py"
GRAPH = ROOT / "moma_batch" / "default.json"
IN_A_PROCESS = 16
"""So many simulated servers share one process, so that 64 cost little memory and time to start."""
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
WRAPPER = """import os, runpy
os.environ.update({variables})
runpy.run_path({main!r}, run_name="__main__")
"""


def simulated(servers: int, rows: int, median_s: float, ray: Path | None) -> dict[str, Any]:
    """One run of so many rows.

    Args:
        median_s: Of the log-normal time that a row takes on its server (sigma 0.5); 0 for none.
        ray: The Python that has Ray, for the Ray backend; None for the local one.

    Returns:
        Rows a second, CPU time of the driver, the machine's load before it, and the efficiency, see `efficiency`.
    """
    with tempfile.TemporaryDirectory(prefix="moma-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        log, out = folder / "log.jsonl", folder / "out"
        variables = {"FAKE_LOG": str(log), "FAKE_MARKS": str(folder), "FAKE_SECONDS": str(median_s)}
        table = _table(folder, rows)
        words = ["run", str(table), "--out", str(out), "--one-phase", "--workflow", str(GRAPH)]
        if ray is None:
            python = sys.executable
            words += [word for url in stack.enter_context(_started(folder, servers, variables)) for word in url]
        else:
            python = str(ray)
            address = stack.enter_context(_cluster(python, servers))
            words += ["--address", address, "--workers", str(servers), *_for_ray(folder, variables)]
        command = [python, str(ROOT / "moma_batch"), *words]
        load = os.getloadavg()[0]
        found = measured(command, {**os.environ, **NO_TOKEN})
        return {
            "servers": servers,
            "rows": rows,
            "median_s": median_s,
            "load": load,
            **result(found, lines_of(out / "journal.jsonl"), lines_of(log), servers),
        }


def result(found: Measured, journal: list[dict[str, Any]], log: list[dict[str, Any]], servers: int) -> dict[str, Any]:
    """What a run gives: the driver's figures, rows a second, efficiency."""
    begins = [entry["at"] for entry in journal if entry["event"] == "begin"]
    ends = [entry["at"] for entry in journal if entry["event"] == "end"]
    figures = {
        "rows_per_s": len(ends) / (max(ends) - min(begins)),
        "driver_cpu_ms_per_row": 1000 * found.cpu_s / len(ends),
        "mean_service_s": sum(entry["seconds"] for entry in log) / len(log),
    }
    return {**figures, **efficiency(journal, log, servers)}


def efficiency(journal: list[dict[str, Any]], log: list[dict[str, Any]], servers: int) -> dict[str, float]:
    """Service time over servers times wall time.

    Returns:
        `whole`: from the first row's begin to the last row's end. `steady`: from the moment at which every server had
        its first row to that at which the last row was given out, so without start and tail.
    """
    begins = [entry for entry in journal if entry["event"] == "begin"]
    last_end = max(entry["at"] for entry in journal if entry["event"] == "end")
    firsts: dict[str, float] = {}
    for entry in begins:
        firsts.setdefault(entry["worker"], entry["at"])
    spans = {
        "whole": (min(firsts.values()), last_end),
        "steady": (max(firsts.values()), max(entry["at"] for entry in begins)),
    }
    found = {}
    for name, (since, until) in spans.items():
        busy = sum(max(0.0, min(until, one["at"] + one["seconds"]) - max(since, one["at"])) for one in log)
        found[name] = busy / (servers * (until - since)) if until > since else 0.0
    return found


@contextmanager
def _started(folder: Path, servers: int, variables: dict[str, str]) -> Iterator[list[tuple[str, str]]]:
    """Simulated servers; the words that name each to `moma_batch`."""
    processes, found = [], []
    try:
        for first in range(0, servers, IN_A_PROCESS):
            count = min(IN_A_PROCESS, servers - first)
            place = folder / f"servers{first}"
            command = [sys.executable, str(STAND_IN), "--servers", str(count)]
            command += ["--input-directory", str(place / "input"), "--output-directory", str(place / "output")]
            process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=subprocess.PIPE, encoding="utf-8"
            )
            processes.append(process)
            assert process.stdout is not None
            found += [("--server", f"http://127.0.0.1:{int(process.stdout.readline())}") for _ in range(count)]
        yield found
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def _cluster(python: str, cpus: int) -> Iterator[str]:
    """A Ray cluster, with a CPU for each simulated ComfyUI, which needs none; its address."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    environment = {**os.environ, **NO_TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    command = [python, str(Path(__file__).with_name("ray_head.py")), str(cpus)]
    with subprocess.Popen(command, env=environment, **pipes) as head:
        assert head.stdout is not None
        yield next(line.strip() for line in head.stdout if re.fullmatch(r"[\d.]+:\d+\n", line))


def _for_ray(folder: Path, variables: dict[str, str]) -> list[str]:
    """A stand-in that the workers of a cluster can start as their ComfyUI; the words that name it."""
    comfyui = folder / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text(WRAPPER.format(variables=variables, main=str(STAND_IN)), encoding="utf-8")
    return ["--comfyui", str(comfyui), "--python", sys.executable]


def _table(folder: Path, rows: int) -> Path:
    """Ten rows for each picture, each with a prompt and a seed of its own."""
    photo = (ROOT / "workbench" / "photo" / "photo.jpg").read_bytes()
    path = folder / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "subject", "prompt", "seed"])
        for row in range(rows):
            picture = folder / f"photo{row // 10}.jpg"
            if row % 10 == 0:
                picture.write_bytes(photo + str(row).encode() + b"\xff\xd9")
            table.writerow([f"r{row}", picture.name, "cup", f"a cup {row % 10}", row])
    return path
