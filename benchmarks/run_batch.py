"""What `moma_batch` costs and how it scales: `python3 benchmarks/run_batch.py` sets up what it needs and measures.

Close other programs first. Servers are simulated in the parts dispatch, servers and rows, and real in `real`.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [str(ROOT / name) for name in ("benchmarks", "scripts")]
sys.path[:0] = FOLDERS

from inside import comfyui_inside
from setup_env import RAY, ensure_ray


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        dispatch_rows: Without service time, on four simulated servers.
        servers: Simulated servers of each run.
        rows_per_server: In each of these runs.
        median_s: Of the service time there.
        rows: Of the table that is planned and resumed.
        real_rows, real_steps: Of the small world.
    """

    dispatch_rows: int
    servers: tuple[int, ...]
    rows_per_server: int
    median_s: float
    rows: int
    real_rows: int
    real_steps: int


FULL = Plan(1000, (1, 4, 16, 64), 16, 3.0, 120_000, 500, 4)
QUICK = Plan(200, (1, 4), 8, 1.0, 4000, 20, 2)
DISPATCH_SERVERS = 4


def measure(part: str, plan: Plan) -> dict[str, Any]:
    """One part's place in the results; backends by name where there are two."""
    from batch_real import small_world
    from batch_rows import many_rows
    from batch_simulated import simulated

    ray = ensure_ray()
    backends: dict[str, Path | None] = {"local": None, "ray": ray}
    if part == "dispatch":
        return {name: simulated(DISPATCH_SERVERS, plan.dispatch_rows, 0, python) for name, python in backends.items()}
    if part == "servers":
        found: dict[str, Any] = {}
        for name, python in backends.items():
            for count in plan.servers:
                rows = count * plan.rows_per_server
                found.setdefault(name, []).append(simulated(count, rows, plan.median_s, python))
        return found
    if part == "rows":
        return many_rows(plan.rows)
    return small_world(plan.real_rows, plan.real_steps, Path(os.environ["COMFYUI_PATH"]), ray)


PARTS = ("dispatch", "servers", "rows", "real")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, few servers")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}, separated by commas; others in --out's file stay")
    parser.add_argument("--out", type=Path, help="write the results to this file as JSON; see --only")
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else list(PARTS)
    unknown = [name for name in options.only if name not in PARTS]
    if unknown:
        parser.error(f"--only: there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    return options


def machine() -> dict[str, Any]:
    """What was measured on."""
    from machine import processor

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "ray": RAY.partition("==")[2],
        "comfyui": Path(os.environ["COMFYUI_PATH"]).name.rpartition("-")[2],
    }


def main() -> None:
    """Set up, then go on inside ComfyUI's Python; results are written after each part."""
    options = parse_arguments()
    os.environ["PYTHONPATH"] = os.pathsep.join(FOLDERS)
    comfyui_inside(__file__)
    from run import write

    results: dict[str, Any] = {"machine": machine(), "plan": "quick" if options.quick else "full"}
    for part in options.only:
        print(f"Measuring: {part}", flush=True)
        results[part] = measure(part, QUICK if options.quick else FULL)
        print(json.dumps(results[part], indent=1), flush=True)
        if options.out:
            write(options.out, results, PARTS)


if __name__ == "__main__":
    main()
