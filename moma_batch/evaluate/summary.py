"""Means and spreads, by subject and by class of prompt: `summary.md` and `summary.csv`."""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..results import write_whole
from .lines import FOLDER, Evaluation, Line, is_measured, parts, read_evaluation

SUMMARY, TABLE = "summary.md", "summary.csv"


@dataclass(frozen=True)
class Figure:
    """A figure over some pictures.

    Attributes:
        pictures: How many have it.
        spread: Standard deviation over the seeds of the mean of each seed's pictures: what another seed would change.
            None with one seed, or where not every seed has the same subjects, prompts and settings.
    """

    mean: float
    spread: float | None
    pictures: int

    def text(self) -> str:
        """As in a table."""
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


def asked(line: Line) -> tuple[str, ...]:
    """What a picture was asked for, but its seed: reference, prompt and settings."""
    settings = (f"{name}={text}" for name, text in line.columns.items() if not name.startswith("note."))
    return (line.reference, line.prompt, *sorted(settings))


def figure_of(lines: Sequence[Line], name: str) -> Figure | None:
    """A figure over the pictures that have it; None if none has."""
    having = [line for line in lines if name in line.figures]
    if not having:
        return None
    seeds: dict[str, list[Line]] = {}
    for line in having:
        seeds.setdefault(line.seed, []).append(line)
    spread = None
    if len(seeds) > 1 and len({tuple(sorted(map(asked, group))) for group in seeds.values()}) == 1:
        means = (statistics.fmean(line.figures[name] for line in group) for group in seeds.values())
        spread = statistics.stdev(means)
    return Figure(statistics.fmean(line.figures[name] for line in having), spread, len(having))


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, str, list[Line]]]:
    """All pictures, those of each class of prompt, those of each subject: kind, name and lines."""
    yield "all", "", list(lines)
    kinds = {"class": [line.kind for line in lines], "subject": [line.subject for line in lines]}
    for kind, names in kinds.items():
        for name in dict.fromkeys(filter(None, names)):
            yield kind, name, [line for line, of in zip(lines, names, strict=True) if of == name]


def write_summary(folder: Path) -> None:
    """Write both files beside `figures.csv`."""
    evaluation = read_evaluation(folder)
    write_whole(folder / FOLDER / SUMMARY, _page(evaluation).encode())
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(("of", "name", "figure", "pictures", "mean", "spread"))
    for kind, name, lines in groups(evaluation.lines):
        for figure in evaluation.figures:
            if found := figure_of(lines, figure):
                spread = "" if found.spread is None else f"{found.spread:.6f}"
                table.writerow((kind, name, figure, found.pictures, f"{found.mean:.6f}", spread))
    write_whole(folder / FOLDER / TABLE, text.getvalue().encode())


def _page(evaluation: Evaluation) -> str:
    lines, failures = evaluation.lines, evaluation.failures
    measured = sum(map(is_measured, lines))
    seeds = {line.seed for line in lines if is_measured(line)}
    page = [f"# {evaluation.folder.resolve().name}", ""]
    page += [f"{measured} of {len(lines)} pictures measured, {len(seeds)} seeds.", ""]
    for backbone in evaluation.about["backbones"]:
        told = ", ".join(
            f"{key} {backbone[key]}" for key in ("revision", "sha256", "transformers") if backbone.get(key)
        )
        page.append(f"- `{backbone['name']}`: {backbone.get('model', '')}, {told}")
    page += ["", "± is the standard deviation over the seeds of each seed's mean."]
    for backbone in dict.fromkeys(parts(name)[1] for name in evaluation.figures):
        names = [name for name in evaluation.figures if parts(name)[1] == backbone]
        page += ["", f"## By {backbone}" if backbone else "## Masks", ""]
        page.append(f"| | pictures | {' | '.join(parts(name)[0] for name in names)} |")
        page.append("| --- | --- |" + " --- |" * len(names))
        for _, group, of in groups(lines):
            found = [figure_of(of, name) for name in names]
            cells = [figure.text() if figure else "" for figure in found]
            count = sum(is_measured(line) for line in of)
            page.append(f"| {_cell(group) or '**all**'} | {count} | {' | '.join(cells)} |")
        for name in names:
            figure = figure_of(lines, name)
            if figure and figure.pictures < measured:
                page += ["", f"{parts(name)[0]}: {figure.pictures} pictures have it."]
    if failures:
        page += ["", "## Failures", "", "| id | status | why |", "| --- | --- | --- |"]
        page += [f"| {_cell(line.id)} | {line.status} | {_cell(line.problem)} |" for line in failures]
    return "\n".join(page) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
