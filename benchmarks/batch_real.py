"""real: rows of the small world through a real ComfyUI: a bare loop, `moma_batch`, and `moma_batch` through Ray.

The same rows, one server each, one after another. The first row, for which the models are loaded, is left out. All have
as many threads: with others a processor adds up in another order, and every picture is another one by a little.
"""

import csv
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_process import growth, held_mb, lines_of, measured
from comfyui_source import ROOT, add_workbench

add_workbench()
from moma_batch.graphs import graph_of
from moma_batch.index import Index
from moma_batch.pictures import chunks
from moma_batch.plan import Planner
from moma_batch.server import Server
from moma_batch.workflow import SMALL_WORLD, with_prefix
from workbench.comfy_server import ComfyServer

ARGUMENTS = ("--disable-api-nodes",)
PROMPTS = 5
POLL_S = 0.02
THREADS = str(os.cpu_count())


def small_world(rows: int, steps: int, comfyui: Path, ray: Path | None) -> dict[str, Any]:
    """Seconds a row of each way, how memory went, and how many rows have the pixels of the loop.

    Args:
        ray: The Python that has Ray; None leaves it out.
    """
    os.environ["OMP_NUM_THREADS"] = THREADS
    with tempfile.TemporaryDirectory(prefix="moma-benchmark-") as name:
        folder, load = Path(name), os.getloadavg()[0]
        table = _table(folder, rows, steps)
        ways = {"loop": _loop(folder, table, comfyui), "local": _run(folder, table, comfyui, None)}
        if ray is not None:
            ways["ray"] = _run(folder, table, comfyui, ray)
        pixels = {name: way.pop("pixels") for name, way in ways.items()}
        return {"rows": rows, "steps": steps, "load": load, "same_pixels": same_as_loop(pixels), **ways}


def same_as_loop(pixels: Mapping[str, Mapping[str, bytes]]) -> dict[str, int]:
    """Of each other way, how many rows have the digest of pixels that the loop's have."""
    loop = pixels["loop"]
    return {
        name: sum(found.get(row) == digest for row, digest in loop.items())
        for name, found in pixels.items()
        if name != "loop"
    }


def _table(folder: Path, rows: int, steps: int) -> Path:
    """The example pictures, five prompts of each, the rest are seeds."""
    photos = sorted((ROOT / "weights" / "examples").glob("*.png"))
    for photo in photos:
        shutil.copyfile(photo, folder / photo.name)
    path = folder / "table.csv"
    seeds = -(-rows // (len(photos) * PROMPTS))
    places = ("on a beach", "in the snow", "in a forest", "on the moon", "in a city")
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "subject", "prompt", "seed", "set.KSampler.steps"])
        for number in range(rows):
            scene, seed = divmod(number, seeds)
            photo, place = photos[scene // PROMPTS], places[scene % PROMPTS]
            subject = photo.stem.split("_")[-1]
            table.writerow([f"r{number}", photo.name, subject, f"A {subject} {place}.", seed, steps])
    return path


def _loop(folder: Path, table: Path, comfyui: Path) -> dict[str, Any]:
    """All prompts queued at once, so that the server never waits; pictures stay where the server puts them."""
    index = Index(folder)
    Planner(table, index, SMALL_WORLD, split=False).plan()
    index.group()
    with ComfyServer(comfyui, folder / "bare", arguments=("--cpu", *ARGUMENTS)) as running:
        server, tasks = Server(running.address), list(index.tasks())
        samples: list[tuple[float, float]] = []
        for task in tasks:
            for name, path in task.spec["files"].values():
                if not (running.input / name).is_file():
                    server.upload(name, Path(path).read_bytes())
        ids = [hashlib.sha256(task.id.encode()).hexdigest() for task in tasks]
        ids = [f"{one[:8]}-{one[8:12]}-4{one[13:16]}-8{one[17:20]}-{one[20:32]}" for one in ids]
        for task, prompt_id in zip(tasks, ids, strict=True):
            server.queue(with_prefix(graph_of(task.spec), f"bare/{task.id}"), prompt_id, {})
        ends, pixels = [], {}
        for task, prompt_id in zip(tasks, ids, strict=True):
            while not (found := server.history(prompt_id)):
                time.sleep(POLL_S)
                if not samples or time.time() - samples[-1][0] > 1:
                    samples.append((time.time(), held_mb(running.process_id)))
            messages = dict(found["status"]["messages"])
            ends.append(messages["execution_success"]["timestamp"] / 1000)
            images = [file for node in found["outputs"].values() for file in node.get("images", [])]
            (file,) = [file for file in images if file["type"] == "output"]
            pixels[task.id] = _pixels((running.output / file["subfolder"] / file["filename"]).read_bytes())
    index.close()
    return {"s_per_row": _per_row(ends), "memory": {"server": growth(samples)}, "pixels": pixels}


def _run(folder: Path, table: Path, comfyui: Path, ray: Path | None) -> dict[str, Any]:
    """`moma_batch` with one server of its own."""
    name = "local" if ray is None else "ray"
    out, base = folder / name, ComfyServer(comfyui, folder / f"{name}-base").base
    more = shlex.join(["--base-directory", str(base), *ARGUMENTS])
    command = [str(ray or sys.executable), str(ROOT / "moma_batch"), "run", str(table), "--out", str(out)]
    command += ["--one-phase", "--workflow", str(SMALL_WORLD), "--workers", "1", "--comfyui", str(comfyui)]
    command += ["--python", sys.executable, "--comfyui-args", more]
    command += ["--address", "local"] if ray else []

    def pids() -> Mapping[str, int]:
        places = [*out.glob("workers/1/pid"), *Path(tempfile.gettempdir()).glob(f"moma_batch-{_run_id(out)}-1/pid")]
        return {"server": int(places[0].read_text(encoding="utf-8").split()[0])} if places else {}

    found = measured(command, {**os.environ, "RAY_AUTH_MODE": "disabled"}, pids)
    ends = [entry["at"] for entry in lines_of(out / "journal.jsonl") if entry["event"] == "end"]
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        made = {row["id"]: row["picture"] for row in csv.DictReader(file)}
    return {
        "s_per_row": _per_row(ends),
        "driver_cpu_ms_per_row": 1000 * found.cpu_s / len(ends),
        "driver_peak_mb": found.peak_mb,
        "memory": {process: growth(samples) for process, samples in found.samples.items()},
        "pixels": {row: _pixels((out / picture).read_bytes()) for row, picture in made.items()},
    }


def _run_id(out: Path) -> str:
    try:
        return str(json.loads((out / "plan.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError):
        return "none"


def _per_row(ends: list[float]) -> float:
    return (max(ends) - min(ends)) / (len(ends) - 1)


def _pixels(content: bytes) -> bytes:
    """Size and pixels of a PNG, without its texts, which name the attempt."""
    kept = (data for kind, data in chunks(content) if kind in (b"IHDR", b"IDAT"))
    return hashlib.sha256(b"".join(kept)).digest()
