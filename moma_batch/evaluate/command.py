"""The commands: evaluate, compare, study, table."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..dreambench import REMOVER, dreambench, mask_table, outside
from ..driver import OK, SOME_FAILED
from ..table import RowError, TableError
from .compare import compare
from .lines import FOLDER, read_evaluation
from .samples import Run
from .study import Study
from .summary import SUMMARY

NONE = "none"
_KINDS = ("clip", "dino", "dinov2")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Put them beside those of the tool."""
    evaluate = commands.add_parser("evaluate", help="measure a run's pictures: likeness, prompt, copies, masks")
    evaluate.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    for kind in _KINDS:
        evaluate.add_argument(f"--{kind}", metavar="MODEL", help="a folder, a name of the hub's local cache, or none")
    evaluate.add_argument("--download", action="store_true", help="fetch models that are not in the hub's cache")
    evaluate.add_argument("--masks", type=Path, help="a folder with the subject's mask of each picture, by its name")
    evaluate.add_argument("--workflow", type=Path, help="the API prompt that a run of an earlier version had")
    evaluate.add_argument("--so-far", action="store_true", help="measure what an unfinished run has")
    evaluate.add_argument("--device", default="auto", help="as PyTorch names it (default: %(default)s)")
    evaluate.add_argument("--batch", type=int, default=16, help="pictures at once (default: %(default)s)")
    evaluate.set_defaults(command=_evaluate)
    beside = commands.add_parser("compare", help="measured runs beside the first; status 1 if a figure fell")
    beside.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of measured runs")
    beside.set_defaults(command=_compare)
    study = commands.add_parser("study", help="the curve of likeness against prompt, with its best point")
    study.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of measured runs")
    study.add_argument("--by", action="append", default=[], metavar="COLUMN", help="makes the points: strength, ...")
    study.add_argument("--split", default="", metavar="COLUMN", help="a curve for each of its values")
    study.add_argument("--likeness", default="", metavar="FIGURE", help='as in "DINOv2 subject"')
    study.add_argument("--prompt", default="", metavar="FIGURE", help="as in CLIP-T")
    study.add_argument("--out", type=Path, help="the folder for curve and table (default: the first run's)")
    study.set_defaults(command=_study)
    for command in (beside, study):
        command.add_argument("--anyway", action="store_true", help="also if sampler or checkpoint are not the same")
    _add_tables(commands.add_parser("table", help="make a table of a folder"))


def _add_tables(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    bench = kinds.add_parser("dreambench", help="of DreamBench's subjects and prompts")
    bench.add_argument("folder", type=Path, help="with prompts_and_classes.txt and a folder for each subject")
    bench.add_argument("--masks", type=Path, help="a folder with SUBJECT/PICTURE.png; else PICTURE_mask.png beside")
    bench.add_argument("--no-masks", action="store_true", help="the whole pictures are the subjects")
    bench.add_argument("--seeds", default="1..4", help="of each row (default: %(default)s)")
    bench.add_argument("--every-picture", action="store_true", help="each is a reference, not the first alone")
    bench.set_defaults(command=_dreambench)
    masks = kinds.add_parser("masks", help="of pictures whose masks ComfyUI's background removal is to make")
    masks.add_argument("folder", type=Path, help="with the pictures")
    masks.add_argument("--model", required=True, help="the file in models/background_removal")
    masks.set_defaults(command=_masks)
    for kind in (bench, masks):
        kind.add_argument("--out", type=Path, required=True, help="the table's file, .csv")


def _evaluate(options: argparse.Namespace) -> int:
    runs = [Run(folder, options.workflow, options.masks, options.so_far) for folder in options.runs]
    if options.batch < 1:
        raise TableError(f"--batch {options.batch}: give a number from 1")
    for run in runs:
        run.check()  # what is wrong with a run is said before models are loaded
    evaluation, backbones = _networks(options)
    failed = 0
    for run in runs:
        lines = evaluation.Measuring(run, backbones, options.batch, _say).evaluate()
        problems = [line for line in lines if line.problem]
        failed += len(problems)
        for line in problems:
            print(f"{line.id}: {line.status}: {line.problem}")
        print(f"{len(lines) - len(problems)} of {len(lines)} pictures measured: {run.folder / FOLDER / SUMMARY}")
    return SOME_FAILED if failed else OK


def _networks(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The module that measures, and the backbones that the command line names."""
    try:
        from . import backbones, evaluation
    except ImportError as error:
        raise TableError(
            f"evaluate needs PyTorch, transformers, Pillow and SciPy, and {sys.executable} lacks {error.name}. "
            "ComfyUI's Python has them: give the command with that one. Or install the pack's extra `evaluation` here."
        ) from error
    device = backbones.find_device(options.device)
    named = {kind: getattr(options, kind) or backbones.DEFAULTS[kind] for kind in _KINDS}
    wanted = {kind: where for kind, where in named.items() if where != NONE}
    if not wanted:
        raise TableError("--clip, --dino and --dinov2 are all none: nothing is left to measure with.")
    return evaluation, [backbones.load_backbone(k, where, device, options.download) for k, where in wanted.items()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _compare(options: argparse.Namespace) -> int:
    if len(options.runs) < 2:
        raise TableError("compare wants two runs or more; the others are held against the first.")
    page, fallen = compare([read_evaluation(run) for run in options.runs], options.anyway)
    print(page)
    for name in fallen:
        print(f"{name} fell by more than its spread over the seeds.")
    return SOME_FAILED if fallen else OK


def _study(options: argparse.Namespace) -> int:
    found = [read_evaluation(run) for run in options.runs]
    study = Study(found, options.by, options.likeness, options.prompt, options.split, options.anyway)
    for panel in study.panels():
        best = panel.chosen
        title = f"{panel.title}: " if panel.title else ""
        figures = f"likeness {best.likeness.text()}, prompt {best.prompt.text()}"
        print(f"{title}best of {len(panel.points)}: {best.label} ({figures})")
    for path in study.write(options.out or options.runs[0] / FOLDER):
        print(f"Wrote {path}")
    return OK


def _dreambench(options: argparse.Namespace) -> int:
    folder = options.folder if not (options.folder / "dataset").is_dir() else options.folder / "dataset"
    try:
        rows, subjects = dreambench(
            folder, options.out, options.seeds, options.masks, options.every_picture, options.no_masks
        )
    except RowError as error:
        raise TableError(f"--seeds: {error}") from error
    more = " ".join(
        ["", *outside(folder, options.out), *(outside(options.masks, options.out) if options.masks else ())]
    )
    print(f"Wrote {options.out}: {rows} rows of {subjects} subjects.")
    print(f"Next: moma_batch run {options.out} --out RUN{more}")
    return OK


def _masks(options: argparse.Namespace) -> int:
    count = mask_table(options.folder, options.out, options.model)
    more = " ".join(["", *outside(options.folder, options.out)])
    print(f"Wrote {options.out}: {count} pictures.")
    print(f"Next: moma_batch run {options.out} --workflow {REMOVER} --out MASKS{more}")
    print("The masks are then in MASKS/images. ComfyUI 0.30 has the nodes for it, 0.16 has not.")
    return OK
