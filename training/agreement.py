"""Whether the evaluation agrees with what is true in the small world: `python3 training/agreement.py`.

Draws held-out subjects by the product in many settings (strength, weight, CFG, parts), has `moma_batch evaluate`
measure them as it measures any run, and holds its ranking of the settings against what a probe reads. Writes its part
of docs/quality.md.
"""

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from comfyui_source import cache_dir
from inside import comfyui_inside

DOCS = ROOT / "docs"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, default=ROOT / "weights", help="the small world's files")
    parser.add_argument("--subjects", type=int, default=4, help="how many subjects are drawn")
    parser.add_argument("--prompts", type=int, default=2, help="places and materials of each")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each subject and prompt")
    parser.add_argument("--strengths", type=int, default=11, help="how many strengths from 0 to 1")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that draw side by side")
    parser.add_argument("--out", type=Path, default=cache_dir() / "agreement", help="the folder for the pictures")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of quality.md")
    return parser.parse_args()


def main() -> None:
    """Draw, evaluate, and write the part."""
    options = parse_arguments()
    sys.path.insert(0, str(comfyui_inside(str(Path(__file__).resolve()))))
    from workbench.bootstrap import bootstrap

    bootstrap()
    from comfyui_moma.training.drawn import drawer

    from workbench.side_by_side import SideBySide

    began = time.monotonic()
    of = (options.files, options.subjects, options.seeds)
    with SideBySide(options.processes, drawer.__module__, drawer.__name__, *of) as drawers:
        lines = measure(options, drawers)
    lines[2:2] = [f"Made by `python3 training/agreement.py` in {(time.monotonic() - began) / 60:.0f} minutes.", ""]
    from comfyui_moma.training.agreement_page import placed

    page = options.docs / "quality.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Quality of the small world\n"
    page.write_text(placed(text, lines), encoding="utf-8")
    print(f"Wrote {page}")


def measure(options: argparse.Namespace, drawers: Any) -> list[str]:
    """Have the small worlds of `drawers` draw, and evaluate; the part's lines."""
    from comfyui_moma.moma_batch.evaluate.evaluation import Measuring
    from comfyui_moma.moma_batch.evaluate.lines import read_evaluation
    from comfyui_moma.moma_batch.evaluate.samples import Run
    from comfyui_moma.training.agreement_page import page_of
    from comfyui_moma.training.agreement_settings import settings
    from comfyui_moma.training.drawn import Asked, SmallWorld, measured_subjects
    from comfyui_moma.training.drawn_run import DrawnRun
    from comfyui_moma.training.measuring import backbones
    from comfyui_moma.training.probe import load
    from comfyui_moma.training.world import MATERIALS, PLACES

    shutil.rmtree(options.out, ignore_errors=True)
    run = DrawnRun(options.out / "run", load())
    world = SmallWorld(options.files, load(), measured_subjects(options.subjects), options.seeds)
    rng = random.Random("agreement")
    everyone = range(options.subjects)
    wanted: dict[str, list[tuple[int, str | None, str | None]]] = {
        "context": [(i, place, None) for i in everyone for place in rng.sample(PLACES, options.prompts)],
        "texture": [(i, None, what) for i in everyone for what in rng.sample(MATERIALS, options.prompts)],
    }
    read: dict[Any, list[Any]] = {}
    chosen = settings(options.strengths)
    for done, setting in enumerate(chosen, 1):
        asked = [Asked(*each, setting.variant()) for each in wanted[setting.task]]
        for one, (pictures, found) in zip(asked, drawers.map(asked), strict=True):
            read.setdefault(setting, []).extend(found)
            notes = {"task": setting.task, "parts": setting.parts, "cfg": f"{setting.cfg:g}"}
            numbers = {"strength": f"{setting.strength:g}", "weight": f"{setting.weight:g}"}
            run.add(world, one.number, (one.place, one.material), pictures, numbers, notes)
        print(f"{done} of {len(chosen)} settings drawn", flush=True)
    Measuring(Run(run.write(), masks=run.masks), backbones(), 32).evaluate()
    return page_of(read_evaluation(run.folder), read, options)


if __name__ == "__main__":
    main()
