"""rows: a table of very many rows planned, half done, and resumed, with workers that answer at once.

What is measured is the driver: how long it takes until the first row runs, and how much memory it ever holds.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from batch_instant import FIRST
from batch_process import Measured, growth, lines_of, measured
from comfyui_source import ROOT

INSTANT = ROOT / "benchmarks" / "batch_instant.py"
GRAPH = ROOT / "moma_batch" / "default.json"
PROMPTS, SEEDS = 10, 4
AFTER = 1000
"""So many tasks are done after resuming: enough to see memory, few enough to be about the start."""


def many_rows(count: int) -> dict[str, Any]:
    """Rows of ten prompts and four seeds for each picture, so that the table has count / 40 of those.

    Returns:
        Below `check`, `first` (until half of the pictures are there) and `resumed`: `start_s` until the first row is
        given out (of `check`, until it ends), `start_cpu_s` of the driver until then, `peak_mb`, and what else was
        measured.
    """
    with tempfile.TemporaryDirectory(prefix="moma-benchmark-") as name:
        folder, load = Path(name), os.getloadavg()[0]
        out, table = folder / "out", _table(folder, count)
        encodings = count // SEEDS
        words = [str(table), "--out", str(out), "--workflow", str(GRAPH), "--server", "http://127.0.0.1:9"]
        checked = _instant(0, ["check", *words], (0, 1))  # 1: nobody answers there
        first = _instant(encodings + count // 2, ["run", *words], (130,))
        began = [entry for entry in lines_of(out / "journal.jsonl") if entry["event"] == "begin"]
        ended = [entry for entry in lines_of(out / "journal.jsonl") if entry["event"] == "end"]
        resumed = _instant(AFTER, ["run", *words], (130,))
        later = [entry for entry in lines_of(out / "journal.jsonl") if entry["event"] == "begin"][len(began) :]
        seconds, start_s = ended[-1]["at"] - began[0]["at"], began[0]["at"] - first.began
        return {
            "rows": count,
            "load": load,
            "photos": count // (PROMPTS * SEEDS),
            "encodings": encodings,
            "check": {"start_s": checked.wall_s, "start_cpu_s": checked.cpu_s, "peak_mb": checked.peak_mb},
            "first": {
                "start_s": start_s,
                "start_cpu_s": _cpu_until_first(first),
                "peak_mb": first.peak_mb,
                "tasks": len(ended),
                "tasks_per_s": len(ended) / seconds,
                "cpu_ms_per_task": 1000 * first.cpu_s / len(ended),
                "memory": growth([sample for sample in first.samples["driver"] if sample[0] > start_s]),
            },
            "resumed": {
                "start_s": later[0]["at"] - resumed.began,
                "start_cpu_s": _cpu_until_first(resumed),
                "peak_mb": resumed.peak_mb,
            },
        }


def _instant(most: int, words: list[str], allowed: tuple[int, ...]) -> Measured:
    return measured([sys.executable, str(INSTANT), str(most), *words], os.environ, allowed=allowed)


def _cpu_until_first(found: Measured) -> float:
    line = next(line for line in found.output.splitlines() if line.startswith(FIRST))
    return float(line.removeprefix(FIRST))


def _table(folder: Path, count: int) -> Path:
    photo = (ROOT / "workbench" / "photo" / "photo.jpg").read_bytes()
    path = folder / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "subject", "prompt", "seed"])
        for row in range(count):
            number, rest = divmod(row, PROMPTS * SEEDS)
            picture = folder / "photos" / f"{number}.jpg"
            if rest == 0:
                picture.parent.mkdir(exist_ok=True)
                picture.write_bytes(photo + str(number).encode() + b"\xff\xd9")
            prompt = f"A photo of a cup in place {rest // SEEDS}, with the light of the evening."
            table.writerow([f"r{row}", f"photos/{number}.jpg", "cup", prompt, rest % SEEDS])
    return path
