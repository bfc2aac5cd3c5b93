"""Runs beside the first of them, picture by picture, if subjects, prompts, seeds and sampler are the same."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..table import TableError
from .lines import Evaluation, Line, is_measured, parts
from .summary import Figure, figure_of

_NAMED = 4
"""How many of something are named in a message."""
Asked = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """A figure of a run beside that of the first, over the pictures that both have.

    Attributes:
        change: Mean of the differences, picture by picture.
    """

    name: str
    first: Figure
    other: Figure
    change: float

    @property
    def fell(self) -> bool:
        """Whether it is lower by more than the spread of the first run's over its seeds."""
        return self.first.spread is not None and self.change < -self.first.spread


def check_backbones(evaluations: Sequence[Evaluation]) -> None:
    """See that each measure has one backbone in all of them.

    Raises:
        TableError: Naming two that differ.
    """
    known: dict[str, tuple[str, Evaluation]] = {}
    definitions = {evaluation.about.get("definition") for evaluation in evaluations}
    if len(definitions) > 1:
        raise TableError("The runs were measured by different versions of moma_batch: give `evaluate` for each again.")
    for evaluation in evaluations:
        for name in evaluation.figures:
            measure, backbone = parts(name)
            before, where = known.setdefault(measure, (backbone, evaluation))
            if _digest(before) != _digest(backbone):
                raise TableError(
                    f"{measure} is measured by {before} in {where.folder} and by {backbone} in {evaluation.folder}: "
                    "figures of different backbones cannot be put side by side. Give `evaluate` for both with the same."
                )


def _digest(backbone: str) -> str:
    return backbone.rpartition(" ")[2]


def check_conditions(first: Evaluation, other: Evaluation, anyway: bool = False) -> list[str]:
    """See that two runs were asked for the same pictures, with the same sampler and checkpoint.

    Args:
        anyway: Conditions may differ; the same pictures must have been asked for all the same.

    Returns:
        What differs, a line for each condition.

    Raises:
        TableError: Naming what differs.
    """
    mine, others = _conditions(first), _conditions(other)
    lacking, more = (
        [ids[0] for asked, ids in _ids(one).items() if asked not in of] for one, of in ((first, others), (other, mine))
    )
    for ids, where in ((lacking, other), (more, first)):
        if ids:
            shown = ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
            raise TableError(
                f"{where.folder} was not asked for {len(ids)} pictures of the other run ({shown}): a comparison wants "
                "the same references, prompts and seeds in both."
            )
    differing: dict[str, str] = {}
    for asked, before in mine.items():
        after = others[asked]
        if not before or not after:
            continue  # a row that could not be used, and is among the failures
        for name in {*before, *after}:
            one, two = (" or ".join(sorted(found.get(name, {"none"}))) for found in (before, after))
            if one != two:
                differing.setdefault(name, f"{name}: {one} and {two}")
    told = [differing[name] for name in sorted(differing)]
    if told and not anyway:
        raise TableError(
            f"{first.folder} and {other.folder} differ in more than what is compared. {'; '.join(told)}. Make them "
            "alike, or give --anyway, which says so in the table."
        )
    return told


def _ids(evaluation: Evaluation) -> dict[Asked, list[str]]:
    found: dict[Asked, list[str]] = {}
    for line in evaluation.lines:
        found.setdefault((line.reference, line.prompt, line.seed), []).append(line.id)
    return found


def _conditions(evaluation: Evaluation) -> dict[Asked, dict[str, set[str]]]:
    """The values of each condition, by what was asked for."""
    found: dict[Asked, dict[str, set[str]]] = {}
    for line in evaluation.lines:
        known = found.setdefault((line.reference, line.prompt, line.seed), {})
        for name, value in line.conditions.items():
            known.setdefault(name, set()).add(value)
    return found


def _by_asked(evaluation: Evaluation) -> dict[Asked, Line]:
    found: dict[Asked, Line] = {}
    for line in evaluation.lines:
        before = found.setdefault((line.reference, line.prompt, line.seed), line)
        if before is not line:
            raise TableError(
                f"{evaluation.folder} has {before.id} and {line.id} for one reference, prompt and seed. Compare runs "
                "with one setting each; `study` shows the settings of one run."
            )
    return found


def differences(first: Evaluation, other: Evaluation) -> list[Difference]:
    """Each figure that both have, over the pictures that are measured in both."""
    mine, others = _by_asked(first), _by_asked(other)
    both = [(line, others[asked]) for asked, line in mine.items() if asked in others]
    both = [pair for pair in both if is_measured(pair[0]) and is_measured(pair[1])]
    there = {_same(name): name for name in other.figures}
    found = []
    for name in first.figures:
        theirs = there.get(_same(name))
        pairs = [(a, b) for a, b in both if theirs and name in a.figures and theirs in b.figures]
        if not pairs or theirs is None:
            continue
        a, b = figure_of([one for one, _ in pairs], name), figure_of([two for _, two in pairs], theirs)
        if a is not None and b is not None:
            change = statistics.fmean(two.figures[theirs] - one.figures[name] for one, two in pairs)
            found.append(Difference(name, a, b, change))
    return found


def _same(name: str) -> tuple[str, str]:
    measure, backbone = parts(name)
    return measure, _digest(backbone)


def compare(evaluations: Sequence[Evaluation], anyway: bool = False) -> tuple[str, list[str]]:
    """A page with each run beside the first, and the names of the figures that fell by more than their spread.

    Raises:
        TableError: They cannot be compared.
    """
    check_backbones(evaluations)
    first, page, fallen = evaluations[0], [], []
    for other in evaluations[1:]:
        told = check_conditions(first, other, anyway)
        page += [f"## {other.folder} beside {first.folder}", "", *(f"- differs: {line}" for line in told)]
        page += [f"- {one.folder}: {len(one.failures)} failures" for one in (first, other) if one.failures]
        page += ["", "| figure | pictures | first | this | change | |", "| --- | --- | --- | --- | --- | --- |"]
        for found in differences(first, other):
            word = "fell" if found.fell else ""
            cells = (
                found.name,
                found.first.pictures,
                found.first.text(),
                found.other.text(),
                f"{found.change:+.3f}",
                word,
            )
            page.append(f"| {' | '.join(map(str, cells))} |")
            fallen += [f"{found.name} in {other.folder}"] if found.fell else []
        page.append("")
    return "\n".join(page), fallen
