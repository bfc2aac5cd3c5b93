"""The part of docs/quality.md that says how well the evaluation agrees with the small world's truth."""

import argparse
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

from scipy.stats import spearmanr

from ..moma_batch.evaluate.lines import Evaluation, Line, parts
from ..moma_batch.evaluate.study import Study
from ..moma_batch.evaluate.summary import figure_of
from .agreement_settings import PROMPT, RECOMMENDED, TRUTHS, WHOLE, Setting
from .drawn import Read

CURVES = "images/agreement.png"
BEGIN, END = "<!-- training/agreement.py: begin -->", "<!-- training/agreement.py: end -->"


def part_of(page: str) -> str:
    """This part of a page's text, with the lines that mark it; empty if there is none."""
    _, begin, rest = page.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    return f"{begin}{inside}{end}\n" if end else ""


def placed(page: str, lines: list[str]) -> str:
    """A page's text with this part in place of the one before, or at its end."""
    part = "\n".join([BEGIN, "", *lines, "", END, ""])
    before = part_of(page)
    return page.replace(before, part) if before else f"{page}\n{part}"


def truth(kind: str, read: list[Read]) -> float:
    """What the probe knows of a setting's pictures: how near they are to their own reference; how sure it is of what
    was asked for, which still tells settings apart where all are right."""
    if kind == "likeness":
        return -statistics.fmean(each.distance for each in read)
    return statistics.fmean(each.sure for each in read)


def setting_of(line: Line) -> Setting:
    """The setting that a line was drawn with."""
    columns = line.columns
    strength, weight, cfg = (float(columns[name]) for name in ("strength", "weight", "note.cfg"))
    return Setting(columns["note.task"], strength, weight, cfg, columns["note.parts"])


def by_setting(evaluation: Evaluation) -> dict[Setting, list[Line]]:
    """The lines of each setting."""
    found: dict[Setting, list[Line]] = {}
    for line in evaluation.lines:
        found.setdefault(setting_of(line), []).append(line)
    return found


def correlation(
    evaluation: Evaluation, read: dict[Setting, list[Read]], task: str, kind: str, measure: str
) -> tuple[float, int]:
    """Spearman's rank correlation of a measure with the truth over the settings of a task, and how many they are."""
    name = evaluation.one(measure)
    pairs = []
    for setting, lines in by_setting(evaluation).items():
        figure = figure_of(lines, name)
        if setting.task == task and figure is not None:
            pairs.append((figure.mean, truth(kind, read[setting])))
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def page_of(evaluation: Evaluation, read: dict[Setting, list[Read]], options: argparse.Namespace) -> list[str]:
    """The part's lines; its curves are drawn into the docs' folder."""
    page = ["## Does the evaluation agree?", ""]
    page += [
        f"`moma_batch evaluate` on {options.subjects} held-out subjects, {options.prompts} prompts, {options.seeds} "
        "seeds in settings of strength, weight, CFG and parts; Spearman's rank correlation over the settings of what "
        "it says with what the probe knows. *probe-I* and *probe-T* are the probe as a backbone, so that they test the "
        "evaluation's crops, pairs and means; *colours-I*, histograms, has no part in the probe.",
        "",
    ]
    page += ["| task | truth | measure | settings | correlation |", "| --- | --- | --- | --- | --- |"]
    for task in RECOMMENDED:
        for kind, measures in TRUTHS.items():
            for measure in measures:
                found, count = correlation(evaluation, read, task, kind, measure)
                page.append(f"| {task} | {kind} | {evaluation.one(measure)} | {count} | {found:.2f} |")
    page += ["", "### Strengths", "", *strengths(evaluation, options.docs), "", f"![Likeness against prompt]({CURVES})"]
    return [*page, "", "### What each part is worth", "", *worth(evaluation, read)]


def strengths(evaluation: Evaluation, docs: Path) -> list[str]:
    """The best strength of each task with all else as README has it, and its curve into the docs' folder."""
    whole = [line for line in evaluation.lines if _is_usual(setting_of(line)) and setting_of(line).parts == WHOLE]
    likeness = TRUTHS["likeness"][0]
    study = Study([replace(evaluation, lines=whole)], ("strength",), likeness, PROMPT, "note.task")
    lines = ["| task | best found | README |", "| --- | --- | --- |"]
    for panel in study.panels():
        lines.append(f"| {panel.title} | {panel.chosen.label} | {RECOMMENDED[panel.title]:g} |")
    drawn = study.write(evaluation.folder)
    (docs / CURVES).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(drawn[-1], docs / CURVES)
    return lines


def worth(evaluation: Evaluation, read: dict[Setting, list[Read]]) -> list[str]:
    """A table of the recommended settings, whole and with a part turned off, with the truth beside the figures."""
    names = [evaluation.one(measure) for measures in TRUTHS.values() for measure in measures]
    heads = ["task", "", *(parts(name)[0] for name in names), "subject found", "place or material right"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for setting, of in by_setting(evaluation).items():
        if _is_usual(setting) and setting.strength == RECOMMENDED[setting.task]:
            figures = [figure_of(of, name) for name in names]
            shares = [statistics.fmean(getattr(one, what) for one in read[setting]) for what in ("found", "aimed")]
            cells = [setting.task, setting.parts, *(figure.text() if figure else "" for figure in figures)]
            lines.append(f"| {' | '.join([*cells, *(f'{share:.0%}' for share in shares)])} |")
    return lines


def _is_usual(setting: Setting) -> bool:
    return setting == Setting(setting.task, setting.strength, parts=setting.parts)
