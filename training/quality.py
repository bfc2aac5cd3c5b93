"""How much of a subject comes through, and of the prompt: `python3 training/quality.py`, which writes docs/quality.md.

Draws subjects that training never saw with the small world's published files, by the product itself, and has a probe
read the pictures (`probe.py`, trained first where there is none).
"""

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from comfyui_source import cache_dir
from inside import comfyui_inside

PAGE = ROOT / "docs" / "quality.md"
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, default=ROOT / "weights", help="the small world's files")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "training", help="where the probe lies")
    parser.add_argument("--subjects", type=int, default=50, help="how many subjects are drawn")
    parser.add_argument("--few", type=int, default=12, help="how many of them for the parts and the strengths")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each subject and prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    return parser.parse_args()


@dataclass(frozen=True)
class Row:
    """One line of a table: shares and means over its pictures.

    Attributes:
        found: How often the subject's own reference is the nearest of all by what the probe reads.
        aimed: How often place (or material) is the one asked for.
        kind: How often the class is.
        overlap: IoU of the found mask with the place where the probe sees the subject; None without a mask.
    """

    name: str
    pictures: int
    found: float
    aimed: float
    kind: float
    overlap: float | None

    def line(self) -> str:
        """As a line of a Markdown table."""
        overlap = "" if self.overlap is None else f"{self.overlap:.2f}"
        shares = " | ".join(f"{share:.0%}" for share in (self.found, self.aimed, self.kind))
        return f"| {self.name} | {self.pictures} | {shares} | {overlap} |"


def main() -> None:
    """Measure and write the page."""
    options = parse_arguments()
    sys.path.insert(0, str(comfyui_inside(str(Path(__file__).resolve()))))
    from workbench.bootstrap import bootstrap

    bootstrap()
    import torch
    from comfyui_moma.training.drawn import SmallWorld, Variant, measured_subjects
    from comfyui_moma.training.probe import train
    from comfyui_moma.training.world import MATERIALS, PLACES

    torch.set_num_threads(options.threads)
    began = time.monotonic()
    probe = train(options.folder / "probe", torch.device("cpu"))
    world = SmallWorld(options.files, probe, measured_subjects(options.subjects), options.seeds)
    rng = random.Random("places")
    places = {i: rng.sample(PLACES, 6) for i in range(options.subjects)}

    def context(name: str, variant: Variant, count: int) -> Row:
        return _row(name, [world.draw(i, place, None, variant) for i in range(count) for place in places[i]])

    def texture(name: str, strength: float, count: int) -> Row:
        used = Variant(strength=strength)
        return _row(name, [world.draw(i, None, material, used) for i in range(count) for material in MATERIALS])

    few = min(options.few, options.subjects)
    tables = {
        "New context (strength 1.0)": (
            "place",
            [
                context("MoMA", Variant(), options.subjects),
                context("the prompt alone", Variant(plain=True), few),
                context("without image tokens", Variant(image_tokens=False), few),
                context("without the shortcut", Variant(shortcut=False), few),
                context("without the subject mask", Variant(mask=False), few),
                context("language model not shown the prompt", Variant(told=False), few),
            ],
        ),
        "New texture, by strength": (
            "material",
            [
                texture(f"{strength:g}", strength, options.subjects if strength == 0.4 else few)
                for strength in STRENGTHS
            ],
        ),
    }
    trained = json.loads((options.files / "trained.json").read_text("utf-8"))["seen"]
    options.page.write_text(_page(options, tables, trained, time.monotonic() - began), encoding="utf-8")
    print(f"Wrote {options.page}")


def _row(name: str, drawn: list[Any]) -> Row:
    readings = [reading for each in drawn for reading in each]
    overlaps = [reading.overlap for reading in readings if reading.overlap is not None]

    def share(what: str) -> float:
        return sum(getattr(reading, what) for reading in readings) / len(readings)

    row = Row(
        name,
        len(readings),
        share("found"),
        share("aimed"),
        share("kind"),
        sum(overlaps) / len(overlaps) if overlaps else None,
    )
    print(row.line(), flush=True)
    return row


def _page(
    options: argparse.Namespace,
    tables: dict[str, tuple[str, list[Row]]],
    trained: dict[str, int],
    seconds: float,
) -> str:
    seen = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    lines = [
        "# Quality of the small world",
        "",
        "Written by `python3 training/quality.py`; how it measures: `training/drawn.py`, `training/probe.py`.",
        "",
        f"{options.subjects} subjects that training never saw, each from one reference on plain paper, {options.seeds} "
        "seeds a prompt; 20 steps, `ddim`,",
        "CFG 4. *Found*: the subject's own reference is the nearest of all by what a probe reads (class, colours, "
        "pattern, shape). *Mask*:",
        "overlap (IoU) of the mask that MoMA found with where the probe sees the subject.",
        "",
        f"The files were trained on so many samples: {seen}. Measured in {seconds / 60:.0f} minutes.",
    ]
    for title, (aim, rows) in tables.items():
        lines += ["", f"## {title}", "", f"| | pictures | found | {aim} right | class right | mask |"]
        lines += ["| --- | --- | --- | --- | --- | --- |", *(row.line() for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
