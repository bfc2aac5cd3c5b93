"""`figures.csv`: a line for each picture that was asked for, its figures under names that say their backbone."""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..results import write_whole
from ..table import TableError
from .samples import MEASURED, Sample

FOLDER, FIGURES, ABOUT = "evaluation", "figures.csv", "evaluation.json"
UNMEASURED = "unmeasured"
"""The status of a picture that is there and cannot be measured."""
_FIXED = ("id", "row", "status", "problem", "subject", "class", "prompt", "seed", "reference")
_COLUMN, _CONDITION = "column ", "condition "


@dataclass(frozen=True)
class Line:
    """A picture that was asked for, with its figures; see `samples.Sample`.

    Attributes:
        reference: SHA-256 of the reference.
        figures: By name, see `named`; empty if there is a `problem`.
    """

    id: str
    status: str
    problem: str
    subject: str
    kind: str
    prompt: str
    seed: str
    reference: str
    columns: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def named(measure: str, backbone: str) -> str:
    """A figure's name: the measure, and which weights measured it."""
    return f"{measure} [{backbone}]" if backbone else measure


def parts(name: str) -> tuple[str, str]:
    """Measure and backbone of a figure's name; a mask's own figures have no backbone."""
    found = re.fullmatch(r"(.*) \[(.*)\]", name)
    return (found[1], found[2]) if found else (name, "")


def line_of(sample: Sample, problem: str, figures: Mapping[str, float]) -> Line:
    """A sample's line."""
    asked = (sample.subject, sample.kind, sample.prompt, sample.seed, sample.digests.get("reference", ""))
    made = (sample.columns, sample.conditions, dict(figures))
    status = UNMEASURED if problem and sample.status == MEASURED else sample.status
    return Line(sample.id, status, problem, *asked, *made)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a run.

    Attributes:
        about: `evaluation.json`: backbones with what is recorded of them.
    """

    folder: Path
    lines: list[Line]
    about: dict[str, Any]

    @property
    def figures(self) -> list[str]:
        """The names of all figures, in their order."""
        return list(dict.fromkeys(name for line in self.lines for name in line.figures))

    @property
    def failures(self) -> list[Line]:
        """Those that have no figures."""
        return [line for line in self.lines if line.problem]

    def one(self, wanted: str) -> str:
        """The figure of this measure.

        Raises:
            TableError: There is none.
        """
        found = [name for name in self.figures if wanted in (name, parts(name)[0])]
        if not found:
            there = ", ".join(parts(name)[0] for name in self.figures)
            raise TableError(f"{self.folder} has no figure {wanted!r}. It has {there}.")
        return found[0]


def write_lines(folder: Path, samples: Iterable[Sample], lines: list[Line], about: Mapping[str, Any]) -> None:
    """Write `figures.csv` and `evaluation.json` into a run's folder."""
    figures = list(dict.fromkeys(name for line in lines for name in line.figures))
    columns = list(dict.fromkeys(name for line in lines for name in line.columns))
    conditions = list(dict.fromkeys(name for line in lines for name in line.conditions))
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    partial = place / (FIGURES + ".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        heads = [*(_COLUMN + name for name in columns), *(_CONDITION + name for name in conditions)]
        table.writerow([*_FIXED, *heads, *figures])
        for sample, line in zip(samples, lines, strict=True):
            cells: list[object] = [line.id, sample.row, line.status, line.problem, line.subject, line.kind]
            cells += [line.prompt, line.seed, line.reference]
            cells += [line.columns.get(name, "") for name in columns]
            cells += [line.conditions.get(name, "") for name in conditions]
            table.writerow([*cells, *(f"{line.figures[n]:.7f}" if n in line.figures else "" for n in figures)])
    partial.replace(place / FIGURES)
    write_whole(place / ABOUT, json.dumps(about, indent=1).encode() + b"\n")


def read_evaluation(folder: Path) -> Evaluation:
    """What `evaluate` wrote into a run's folder.

    Raises:
        TableError: It was not given there.
    """
    try:
        about = json.loads((folder / FOLDER / ABOUT).read_text(encoding="utf-8"))
        with (folder / FOLDER / FIGURES).open(encoding="utf-8", newline="") as file:
            lines = [_line(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError) as error:
        raise TableError(f"{folder} is not measured: give `evaluate {folder}` first ({error}).") from error
    return Evaluation(folder, lines, about)


def _line(row: Mapping[str, str]) -> Line:
    groups: dict[str, dict[str, str]] = {_COLUMN: {}, _CONDITION: {}, "": {}}
    for name, cell in row.items():
        if name not in _FIXED and cell:
            kind = next(kind for kind in groups if name.startswith(kind))
            groups[kind][name.removeprefix(kind)] = cell
    figures = {name: float(cell) for name, cell in groups[""].items()}
    told = (row["id"], row["status"], row["problem"])
    asked = (row["subject"], row["class"], row["prompt"], row["seed"], row["reference"])
    return Line(*told, *asked, groups[_COLUMN], groups[_CONDITION], figures)


def is_measured(line: Line) -> bool:
    """Whether it has figures."""
    return line.status == MEASURED and not line.problem
