"""Likeness against prompt over settings: a curve with its chosen point, as SVG, PNG and table."""

import csv
import io
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..results import write_whole
from ..table import TableError
from .compare import check_backbones, check_conditions
from .lines import Evaluation, Line
from .summary import Figure, figure_of

NAME = "study"
LEAST_REACH = 0.01
"""Of a figure's best value: settings that differ by less are as good as one another in it."""


@dataclass(frozen=True)
class Point:
    """A setting with its two figures.

    Attributes:
        setting: The value of each column.
    """

    setting: tuple[str, ...]
    likeness: Figure
    prompt: Figure

    @property
    def label(self) -> str:
        """As in a picture."""
        return ", ".join(self.setting)


@dataclass(frozen=True)
class Panel:
    """The points of one part of the rows, as new context or new texture."""

    title: str
    points: list[Point]

    @property
    def chosen(self) -> Point:
        """The point nearest to the corner where both are at their best, each scaled to its range over the points; to
        its mean spread over the seeds, or `LEAST_REACH`, where that is more: neither chance nor what nobody would
        see is blown up to a difference."""

        def distance(point: Point) -> float:
            found = 0.0
            for name in ("likeness", "prompt"):
                figures: list[Figure] = [getattr(each, name) for each in self.points]
                means = [figure.mean for figure in figures]
                spread = statistics.fmean(figure.spread or 0.0 for figure in figures)
                best = max(means)
                reach = max(best - min(means), spread, LEAST_REACH * abs(best))
                found += ((best - getattr(point, name).mean) / reach) ** 2 if reach else 0.0
            return found

        return min(self.points, key=distance)


@dataclass(frozen=True)
class Study:
    """What is held against what.

    Attributes:
        by: The columns whose values make the points, as in strength; with several runs, each run is a point too.
        likeness, prompt: Measures, as in DINOv2 subject and CLIP-T; empty: the last likeness that there is, of the
            subject alone if masks were found, and the first of a text.
        split: A column with a panel for each of its values.
    """

    evaluations: Sequence[Evaluation]
    by: Sequence[str] = ()
    likeness: str = ""
    prompt: str = ""
    split: str = ""
    anyway: bool = False

    def axes(self) -> tuple[str, str]:
        """The full names of the figures, which say their backbones.

        Raises:
            TableError: There is no such figure.
        """
        first = self.evaluations[0]
        backbones = first.about["backbones"]
        likeness, prompt = self.likeness, self.prompt
        if not likeness:
            measure = str(backbones[-1]["image_measure"])
            own = [name for name in first.figures if name.startswith(f"{measure} subject [")]
            likeness = own[0] if own else measure
        if not prompt:
            texts = [str(backbone["text_measure"]) for backbone in backbones if backbone["text_measure"]]
            if not texts:
                raise TableError(
                    f"{first.folder} has no figure of the prompt: give `evaluate` with a backbone for texts."
                )
            prompt = texts[0]
        return first.one(likeness), first.one(prompt)

    def panels(self) -> list[Panel]:
        """The points.

        Raises:
            TableError: The runs cannot be compared, or a column is not there.
        """
        check_backbones(self.evaluations)
        if not self.by and len(self.evaluations) < 2:
            raise TableError("A study of one run wants --by COLUMN, as in --by strength; or name several runs.")
        for other in self.evaluations[1:]:
            check_conditions(self.evaluations[0], other, self.anyway)
        likeness, prompt = self.axes()
        sorted_in: dict[str, dict[tuple[str, ...], list[Line]]] = {}
        for evaluation in self.evaluations:
            run = (evaluation.folder.resolve().name,) if len(self.evaluations) > 1 else ()
            for line in evaluation.lines:
                setting = (*run, *(self._value(evaluation, line, name) for name in self.by))
                title = self._value(evaluation, line, self.split) if self.split else ""
                sorted_in.setdefault(title, {}).setdefault(setting, []).append(line)
        found = []
        for title, settings in sorted_in.items():
            points = []
            for setting in sorted(settings, key=_order):
                figures = [figure_of(settings[setting], name) for name in (likeness, prompt)]
                if figures[0] and figures[1]:
                    points.append(Point(setting, figures[0], figures[1]))
            if points:
                found.append(Panel(title, points))
        return found

    def _value(self, evaluation: Evaluation, line: Line, column: str) -> str:
        known = {**line.columns, "note.class": line.kind, "note.subject": line.subject}
        if column not in known and not line.problem:
            raise TableError(f"{line.id} of {evaluation.folder} has no column {column!r}. It has {', '.join(known)}.")
        return known.get(column, "")

    def write(self, folder: Path) -> list[Path]:
        """Write `study.csv`, `study.svg` and `study.png` into a folder; their paths.

        Raises:
            TableError: See `panels`; or Matplotlib is missing.
        """
        panels, axes = self.panels(), self.axes()
        if not panels:
            raise TableError("No picture of the study has both figures.")
        text = io.StringIO(newline="")
        table = csv.writer(text)
        heads = [*(["run"] if len(self.evaluations) > 1 else []), *self.by]
        table.writerow(["part", *heads, "pictures", *axes, *(f"spread of {name}" for name in axes), "chosen"])
        for panel in panels:
            for point in panel.points:
                both = (point.likeness, point.prompt)
                spreads = ("" if figure.spread is None else f"{figure.spread:.6f}" for figure in both)
                cells = [
                    panel.title,
                    *point.setting,
                    point.likeness.pictures,
                    *(f"{figure.mean:.6f}" for figure in both),
                ]
                table.writerow([*cells, *spreads, "yes" if point is panel.chosen else ""])
        write_whole(folder / f"{NAME}.csv", text.getvalue().encode())
        drawn = [folder / f"{NAME}.svg", folder / f"{NAME}.png"]
        _draw(panels, axes, drawn)
        return [folder / f"{NAME}.csv", *drawn]


def _order(setting: tuple[str, ...]) -> tuple[tuple[float, str], ...]:
    """Numbers by their size, before texts."""

    def one(text: str) -> tuple[float, str]:
        try:
            return float(text), ""
        except ValueError:
            return float("inf"), text

    return tuple(map(one, setting))


def _draw(panels: Sequence[Panel], axes: tuple[str, str], paths: Sequence[Path]) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise TableError(
            f"{NAME}.csv is written; its picture needs Matplotlib in this Python: pip install matplotlib."
        ) from error
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = NAME  # the same picture gives the same file
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(grid[0], panels, strict=True):
        _draw_panel(axis, panel)
        axis.set(title=panel.title, xlabel=axes[1], ylabel=axes[0])
    for path in paths:
        more: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 120}
        figure.savefig(path, **more)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel) -> None:
    """A line through the points that differ only in their last column; the chosen one has a ring."""
    for first, group in itertools.groupby(panel.points, key=lambda point: point.setting[:-1]):
        points = list(group)
        x, y = ([getattr(point, name).mean for point in points] for name in ("prompt", "likeness"))
        spreads = {
            f"{side}err": [getattr(point, name).spread or 0.0 for point in points]
            for side, name in (("x", "prompt"), ("y", "likeness"))
        }
        axis.errorbar(x, y, **spreads, marker="o", capsize=2, linewidth=1, label=", ".join(first) or None)
    for point in panel.points:
        place = (point.prompt.mean, point.likeness.mean)
        axis.annotate(point.setting[-1], place, textcoords="offset points", xytext=(6, 4), fontsize="small")
    best = panel.chosen
    ring = {"s": 220, "facecolors": "none", "edgecolors": "black", "linewidths": 1.5, "zorder": 5}
    axis.scatter([best.prompt.mean], [best.likeness.mean], label=f"chosen: {best.label}", **ring)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
