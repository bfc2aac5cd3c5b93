"""The one benchmark command: `python3 benchmarks/run.py` sets up what it needs, measures, prints a table.

Every figure stands beside its baseline from the same run, as a ratio; a GPU is used if there is one. Close other
programs first: it takes more than an hour on two cores, with `--quick` some minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [str(ROOT / name) for name in ("benchmarks", "scripts")]
sys.path[:0] = FOLDERS

from inside import comfyui_inside
from table import NAMES, rows, text_table


class WorkerError(Exception):
    """A measuring process failed; its own output says why."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small pictures, few repeats")
    parser.add_argument(
        "--only", help=f"some of {', '.join(NAMES)}, separated by commas; the others in --out's file stay"
    )
    parser.add_argument("--out", type=Path, help="write the results to this file as JSON; see --only")
    parser.add_argument(
        "--moma-repo",
        type=Path,
        help="a checkout of the released MoMA code, to measure it in the part `step` too; needs diffusers, which a "
        "folder in PYTHONPATH can hold: pip install --no-deps --target DIR diffusers importlib_metadata zipp",
    )
    parser.add_argument("--plan", choices=["tiny"], help=argparse.SUPPRESS)  # the tests' own
    options = parser.parse_args()
    options.plan = options.plan or ("quick" if options.quick else "full")
    options.only = options.only.split(",") if options.only else list(NAMES)
    unknown = [name for name in options.only if name not in NAMES]
    if unknown:
        parser.error(f"--only: there is no part {unknown[0]}; the parts are {', '.join(NAMES)}")
    return options


def work(options: argparse.Namespace, cases: list[tuple[str, str]]) -> dict[str, Any]:
    """Measure cases in a process of their own."""
    words = [word for case in cases for word in ("--case", *case)]
    if options.moma_repo:
        words += ["--moma-repo", str(options.moma_repo.resolve())]
    path = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="moma-benchmark-") as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), options.plan, str(out), *words]
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode != 0:
            raise WorkerError(", ".join(" ".join(case) for case in cases))
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def run_inside(options: argparse.Namespace) -> dict[str, Any]:
    """With ComfyUI's Python: all parts, one process after another."""
    import torch
    from parts import PARTS, SHARED
    from plan import plan_for

    plan = plan_for(options.plan, torch.cuda.is_available())
    shared = [part for part in options.only if part in SHARED]
    print(f"Measuring: {', '.join(shared) or 'the machine'}", flush=True)
    first = work(options, [(part, "all") for part in shared])
    processes = {
        "compile": [list(PARTS["compile"].CASES)],
        "mllm": PARTS["mllm"].processes(first["precisions"], plan.mllm_full, torch.cuda.is_available()),
        "memory": [[case] for case in plan.memory_cases],
        "leak": [list(PARTS["leak"].CASES)],
    }
    measured: dict[str, dict[str, Any]] = first["found"]
    for part, groups in processes.items():
        for cases in groups if part in options.only else ():
            print(f"Measuring: {part}, {', '.join(cases)}", flush=True)
            found = work(options, [(part, case) for case in cases])["found"]
            measured.setdefault(part, {}).update(found[part])
    results = {part: PARTS[part].result(measured[part]) for part in NAMES if part in measured}
    return {"machine": first["machine"], "plan": options.plan, **results}


def write(path: Path, results: dict[str, Any], names: Sequence[str] = tuple(NAMES)) -> None:
    """The file gets these results; other parts in it stay if they come from the same machine, versions and plan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(known.get(name) == results[name] for name in ("machine", "plan"))
    merged = {**known, **results} if same else results
    ordered = {name: merged[name] for name in ("machine", "plan", *names) if name in merged}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {path}")


def main() -> None:
    """Set up, then go on inside ComfyUI's Python."""
    options = parse_arguments()
    comfyui_inside(__file__)
    try:
        results = run_inside(options)
    except WorkerError as error:
        sys.exit(f"error: could not measure {error}; see above")
    print(json.dumps(results["machine"], indent=1))
    print(text_table(rows(results)))
    if options.out:
        write(options.out, results)


if __name__ == "__main__":
    main()
