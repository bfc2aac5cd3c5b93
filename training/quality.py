"""How much of a subject comes through, and of the prompt: `python3 training/quality.py`, which writes docs/quality.md.

Draws subjects that training never saw with the small world's published files, by the product itself, and has a probe
read the pictures (`probe.py`).
"""

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from inside import comfyui_inside

DOCS = ROOT / "docs"
CURVES, SHEET, SHAPES = "images/quality_strengths.png", "images/quality_pictures.png", "images/quality_shapes.png"
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ENDS = (0.05, 0.95)
"""Near both ends of what a number of a shape can be."""
SHAPED = 16
"""Subjects whose shape is changed to see whether the pictures follow."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, default=ROOT / "weights", help="the small world's files")
    parser.add_argument("--subjects", type=int, default=50, help="how many subjects are drawn")
    parser.add_argument("--few", type=int, default=12, help="how many of them for what is compared with MoMA")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each subject and prompt")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that draw side by side")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder that quality.md and its pictures go to")
    return parser.parse_args()


@dataclass(frozen=True)
class Row:
    """One line of a table: shares and means over its pictures.

    Attributes:
        found: How often the subject's own reference is the nearest of all by what the probe reads.
        aimed: How often place (or material) is the one asked for.
        kind: How often the class is.
        shape: Mean error of the two numbers of the subject's shape, which lie in 0..1.
        overlap: IoU of the found mask with the place where the probe sees the subject; None without a mask.
    """

    name: str
    pictures: int
    found: float
    aimed: float
    kind: float
    shape: float
    overlap: float | None

    @classmethod
    def of(cls, name: str, readings: list[Any]) -> "Row":
        """From `drawn.Read` of each picture."""

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        found, aimed, kind, shape = (
            mean([getattr(each, what) for each in readings]) for what in ("found", "aimed", "kind", "shape")
        )
        overlaps = [each.overlap for each in readings if each.overlap is not None]
        row = cls(name, len(readings), found, aimed, kind, shape, mean(overlaps) if overlaps else None)
        print(row.line(), flush=True)
        return row

    def line(self) -> str:
        """As a line of a Markdown table."""
        overlap = "" if self.overlap is None else f"{self.overlap:.2f}"
        shares = " | ".join(f"{share:.0%}" for share in (self.found, self.aimed, self.kind))
        return f"| {self.name} | {self.pictures} | {shares} | {self.shape:.2f} | {overlap} |"


@dataclass(frozen=True)
class ShapeRow:
    """How far pictures follow a reference whose shape alone is changed, one line of its table.

    Attributes:
        read: For each number of the shape: the mean that the probe reads where it is near 0 in the reference, and where
            it is near 1.
    """

    name: str
    pictures: int
    read: tuple[tuple[float, float], tuple[float, float]]

    @classmethod
    def of(cls, name: str, readings: dict[tuple[int, float], list[Any]]) -> "ShapeRow":
        """From `drawn.Read` of the pictures for each number of the shape and each of `ENDS`."""

        def mean(number: int, end: float) -> float:
            return sum(each.shapes[number] for each in readings[number, end]) / len(readings[number, end])

        first, second = ((mean(number, ENDS[0]), mean(number, ENDS[1])) for number in (0, 1))
        row = cls(name, sum(map(len, readings.values())), (first, second))
        print(name, row.pictures, row.read, flush=True)
        return row

    def line(self, painted: "ShapeRow") -> str:
        """As a line of a Markdown table, held against the painter's own pictures."""
        numbers = " | ".join(f"{low:.2f} to {high:.2f}" for low, high in self.read)
        return f"| {self.name} | {self.pictures} | {numbers} | {self.moved / painted.moved:.0%} |"

    @property
    def moved(self) -> float:
        """The change from end to end, of both numbers together."""
        return sum(high - low for low, high in self.read)


def main() -> None:
    """Measure and write the page."""
    options = parse_arguments()
    sys.path.insert(0, str(comfyui_inside(str(Path(__file__).resolve()))))
    from workbench.bootstrap import bootstrap

    bootstrap()
    from comfyui_moma.training.drawn import drawer

    from workbench.side_by_side import SideBySide

    of = (options.files, options.subjects, options.seeds)
    with SideBySide(options.processes, drawer.__module__, drawer.__name__, *of) as drawers:
        measure(options, drawers)


def measure(options: argparse.Namespace, drawers: Any) -> None:
    """Have the small worlds of `drawers` draw, and write the page."""
    import torch
    from comfyui_moma.training.agreement_page import part_of
    from comfyui_moma.training.drawn import Asked, SmallWorld, Variant, measured_subjects
    from comfyui_moma.training.probe import load
    from comfyui_moma.training.vae import save_sheet
    from comfyui_moma.training.world import MATERIALS, PLACES

    began = time.monotonic()
    world = SmallWorld(options.files, load(), measured_subjects(options.subjects), options.seeds)
    rng = random.Random("places")
    places = {i: rng.sample(PLACES, 6) for i in range(options.subjects)}
    few = min(options.few, options.subjects)

    def drawn(name: str, asked: list[Any]) -> Row:
        return Row.of(name, [read for _, readings in drawers.map(asked) for read in readings])

    def context(name: str, used: Variant, count: int = few) -> Row:
        return drawn(name, [Asked(i, where, None, used) for i in range(count) for where in places[i]])

    def texture(name: str, used: Variant, count: int = few) -> Row:
        return drawn(name, [Asked(i, None, what, used) for i in range(count) for what in MATERIALS])

    def painted(asked: list[Asked]) -> Row:
        return Row.of("painted, not drawn", [read for each in asked for read in world.painted(each)])

    def shaped(used: Variant, number: int, end: float, material: bool = False) -> list[Asked]:
        asked = []
        for i in range(min(SHAPED, options.subjects)):
            other = world.shape(i)[1 - number]
            variant = replace(used, shape=(end, other) if number == 0 else (other, end))
            made = MATERIALS[i % len(MATERIALS)] if material else None
            asked.append(Asked(i, None if material else places[i][0], made, variant))
        return asked

    def follows(name: str, used: Variant, material: bool = False) -> ShapeRow:
        """Whether drawn pictures do."""
        cases = [(number, end) for number in (0, 1) for end in ENDS]
        asked = {case: drawers.map(shaped(used, *case, material)) for case in cases}
        return ShapeRow.of(
            name, {case: [read for _, reads in found for read in reads] for case, found in asked.items()}
        )

    everyone = range(options.subjects)
    curves = {
        "New context, by strength": ("place", [context(f"{s:g}", Variant(strength=s)) for s in STRENGTHS]),
        "New texture, by strength": ("material", [texture(f"{s:g}", Variant(strength=s)) for s in STRENGTHS]),
    }

    def compared(title: str, strength: float) -> Row:
        """What the other rows of a table are to be held against: MoMA on their subjects."""
        (row,) = (row for row in curves[title][1] if row.name == f"{strength:g}")
        return replace(row, name=f"**MoMA**, the first {few}")

    tables = {
        "New context (strength 1.0)": (
            "place",
            [
                context("**MoMA**", Variant(), options.subjects),
                painted([Asked(i, where, None) for i in everyone for where in places[i]]),
                compared("New context, by strength", 1.0),
                context("the prompt alone", Variant(plain=True)),
                context("without image tokens", Variant(image_tokens=False)),
                context("without the shortcut", Variant(shortcut=False)),
                context("without the subject mask", Variant(mask=False)),
                context("language model not shown the prompt", Variant(told=False)),
                context(
                    "image tokens only, no mask, no prompt (as IPAdapter)",
                    Variant(shortcut=False, mask=False, told=False),
                ),
                context("shortcut only, no mask (as reference-only)", Variant(image_tokens=False, mask=False)),
                context("three references", Variant(references=3)),
                context("a region mask on the middle", Variant(region=True)),
                context("a second subject, kept to a corner", Variant(second=True)),
            ],
        ),
        "New texture (strength 0.4)": (
            "material",
            [
                texture("**MoMA**", Variant(strength=0.4), options.subjects),
                painted([Asked(i, None, what) for i in everyone for what in MATERIALS]),
                compared("New texture, by strength", 0.4),
                texture("the prompt alone", Variant(plain=True)),
                texture("without image tokens", Variant(image_tokens=False, strength=0.4)),
                texture("language model not shown the prompt", Variant(told=False, strength=0.4)),
                texture("the prompt to the language model alone", Variant(said=False, strength=0.4)),
                texture("the prompt to neither", Variant(told=False, said=False, strength=0.4)),
            ],
        ),
    }
    at_ends = {(number, end): shaped(Variant(), number, end) for number in (0, 1) for end in ENDS}
    by_painter = {case: [read for each in asked for read in world.painted(each)] for case, asked in at_ends.items()}
    shapes = [
        ShapeRow.of("painted, not drawn", by_painter),
        follows("**MoMA**, new context", Variant()),
        follows("**MoMA**, new texture (strength 0.4)", Variant(strength=0.4), material=True),
        follows("new context without image tokens", Variant(image_tokens=False)),
        follows("new context without the shortcut", Variant(shortcut=False)),
    ]
    _draw_curves(options.docs / CURVES, curves)
    shown = []
    for i in range(min(8, options.subjects)):
        asked = [Asked(i, where, None) for where in places[i][:2]]
        asked.append(Asked(i, None, MATERIALS[i % len(MATERIALS)], Variant(strength=0.4)))
        shown.append(torch.stack([world.reference(i), *(pictures[0] for pictures, _ in drawers.map(asked))]))
    save_sheet(options.docs / SHEET, list(torch.stack(shown).transpose(0, 1)))
    rows = []
    for case in ((0, ENDS[0]), (0, ENDS[1])):
        asked = shaped(Variant(), *case)[:8]
        rows.append(torch.stack([world.reference(each.number, each.variant) for each in asked]))
        rows.append(torch.stack([pictures[0] for pictures, _ in drawers.map(asked)]))
    save_sheet(options.docs / SHAPES, rows)
    trained = json.loads((options.files / "trained.json").read_text("utf-8"))["seen"]
    text = _page(options, tables | curves, shapes, trained, time.monotonic() - began)
    page = options.docs / "quality.md"
    agreement = part_of(page.read_text(encoding="utf-8")) if page.is_file() else ""
    page.write_text(f"{text}\n{agreement}" if agreement else text, encoding="utf-8")
    print(f"Wrote {page}")


def _draw_curves(path: Path, curves: dict[str, tuple[str, list[Row]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (title, (aim, rows)) in zip(axes, curves.items(), strict=True):
        strengths = [float(row.name) for row in rows]
        for name, values in (
            ("subject found", [row.found for row in rows]),
            (f"{aim} right", [row.aimed for row in rows]),
            ("class right", [row.kind for row in rows]),
        ):
            axis.plot(strengths, [100 * value for value in values], marker="o", label=name)
        axis.set(title=title, xlabel="strength of the shortcut", ylim=(0, 103))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize="small")
    axes[0].set_ylabel("% of pictures")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _page(
    options: argparse.Namespace,
    tables: dict[str, tuple[str, list[Row]]],
    shapes: list[ShapeRow],
    trained: dict[str, int],
    seconds: float,
) -> str:
    seen = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    lines = [
        "# Quality of the small world",
        "",
        "Written by `python3 training/quality.py`; how it measures: `training/drawn.py`, `training/probe.py`.",
        "",
        f"![Eight subjects: reference, in two places, of a material]({SHEET})",
        "",
        f"{options.subjects} subjects that training never saw, each from one reference on plain paper, {options.seeds} "
        f"seeds a prompt (the other rows: the first {options.few} of them); 20 steps, `ddim`, CFG 4.",
        "",
        f"- *Found*: the subject's own reference is the nearest of all {options.subjects} by what a probe reads: "
        "class, colours, pattern, shape. The probe learnt from pictures of its own.",
        "- *Place*, *material*, *class right*: what the probe reads is what was asked for.",
        "- *Shape*: mean error of the two numbers that make a subject's shape, 0..1; 0.33 is a guess. The probe reads "
        "them roughly itself; the last table tells better what comes through.",
        "- *Painted, not drawn*: the painter's own pictures of these subjects: the most that the probe can find.",
        "- *Mask*: overlap (IoU) of the mask that MoMA found with where the probe sees the subject.",
        "",
        f"The files were trained on so many samples: {seen}. Measured in {seconds / 60:.0f} minutes.",
    ]
    for title, (aim, rows) in tables.items():
        lines += ["", f"## {title}", "", f"| | pictures | found | {aim} right | class right | shape | mask |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |", *(row.line() for row in rows)]
    lines += ["", f"![Both by strength]({CURVES})"]
    lines += [
        "",
        "## Shape",
        "",
        f"Two references of a subject that differ in one number of its shape alone, near 0 ({ENDS[0]:g}) and near 1 "
        f"({ENDS[1]:g}), prompt and noise the same: what the probe reads in the pictures, as a mean over the first "
        f"{min(SHAPED, options.subjects)} subjects. *Followed*: the change from near 0 to near 1, both numbers "
        "together, as a share of that in the painter's own pictures.",
        "",
        "| | pictures | first number | second number | followed |",
        "| --- | --- | --- | --- | --- |",
        *(row.line(shapes[0]) for row in shapes),
        "",
        f"![References near 0, what is drawn of them, references near 1, what is drawn of them]({SHAPES})",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
