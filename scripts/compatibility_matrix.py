"""Runs the tests on several ComfyUI, transformers and editor releases: `python3 scripts/compatibility_matrix.py`.

On each ComfyUI the core: everything but the slow and the browser tests. In each editor the browser tests, on the newest
ComfyUI. The results go into the tables of docs/compatibility_versions.md; rows of combinations that did not run stay.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TypeVar

from comfyui_source import NEWEST, OLDEST, ROOT, SetupError, add_workbench
from frontends import NEWEST_FRONTEND, OLDEST_FRONTEND, find_frontend
from setup_env import Environment, environment

add_workbench()
from workbench import EDITOR

PAGE = ROOT / "docs" / "compatibility_versions.md"
CORE, BROWSER = "not slow and not browser", "browser"
OLDEST_TRANSFORMERS = "4.50.3"
"""What the requirements of the oldest ComfyUI accept."""


@dataclass(frozen=True)
class Combination:
    """A ComfyUI and a transformers release.

    Attributes:
        comfyui: A version, or what the table calls the ComfyUI in a folder.
        transformers: None for the newest that ComfyUI's requirements give.
        folder: Where this ComfyUI lies; None for one that is fetched.
    """

    comfyui: str
    transformers: str | None = None
    folder: Path | None = None


MATRIX = (
    Combination(OLDEST, OLDEST_TRANSFORMERS),
    Combination(OLDEST),
    Combination("0.20.1"),
    Combination("0.26.0"),
    Combination(NEWEST, OLDEST_TRANSFORMERS),
    Combination(NEWEST),
)
EDITORS = (OLDEST_FRONTEND, "1.47.12", NEWEST_FRONTEND)
"""The ones that come with the oldest and the newest ComfyUI, and the newest."""


@dataclass(frozen=True)
class Row:
    """One line of the table of ComfyUI versions."""

    comfyui: str
    transformers: str
    torch: str
    python: str
    passed: int
    failed: int
    date: str

    @property
    def key(self) -> tuple[str, str]:
        """A later run of the same combination replaces the row."""
        return self.comfyui, "old" if self.transformers == OLDEST_TRANSFORMERS else "new"


@dataclass(frozen=True)
class EditorRow:
    """One line of the table of editors."""

    editor: str
    comfyui: str
    passed: int
    failed: int
    date: str

    @property
    def key(self) -> str:
        """A later run in the same editor replaces the row."""
        return self.editor


AnyRow = TypeVar("AnyRow", Row, EditorRow)


def run(combination: Combination, pytest_arguments: list[str]) -> Row:
    """Set up, run the core tests with their output shown, and count.

    Raises:
        SetupError: The environment cannot be made, or pytest did not get as far as a report.
    """
    pins = [f"transformers=={combination.transformers}"] if combination.transformers else []
    found = environment(combination.folder or combination.comfyui, pins)
    passed, failed = _tests(found, CORE, {}, pytest_arguments)
    transformers, torch, python = _versions(found)
    return Row(combination.comfyui, transformers, torch, python, passed, failed, _today())


def run_editor(version: str, pytest_arguments: list[str]) -> EditorRow:
    """Run the browser tests in this version of the editor, on the newest ComfyUI, and count.

    Raises:
        SetupError: As in `run`.
    """
    found = environment(NEWEST)
    passed, failed = _tests(found, BROWSER, {EDITOR: str(find_frontend(version))}, pytest_arguments)
    return EditorRow(version, NEWEST, passed, failed, _today())


def _tests(found: Environment, kind: str, extra: Mapping[str, str], pytest_arguments: list[str]) -> tuple[int, int]:
    """Run the tests of a kind; how many passed and failed."""
    print(f"\n=== ComfyUI {found.name} {' '.join(extra.values())} ===", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [found.python, "-m", "pytest", "-q", "-m", kind, f"--junitxml={report}", *pytest_arguments]
        variables = {**found.variables(), **extra}
        status = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
        if status not in (0, 1) or not report.is_file():  # 1: some tests failed; other ones mean that it did not run
            raise SetupError(f"pytest ended with status {status} on ComfyUI {found.name}, see its output above.")
        return _counts(report)


def _counts(report: Path) -> tuple[int, int]:
    """Passed and failed; a skipped test is none that passed."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total, bad, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return total - bad - skipped, bad


def _versions(found: Environment) -> list[str]:
    code = (
        "import platform; from importlib.metadata import version; "
        "print(version('transformers'), version('torch'), platform.python_version())"
    )
    return subprocess.run([found.python, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout.split()


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def _markers(kind: type) -> tuple[str, str]:
    """What stands around the table of a kind of rows."""
    name = {Row: "matrix", EditorRow: "editors"}[kind]
    return f"<!-- {name}: written by scripts/compatibility_matrix.py -->", f"<!-- end of {name} -->"


def read_rows(text: str, kind: type[AnyRow]) -> list[AnyRow]:
    """The rows between the markers."""
    begin, end = _markers(kind)
    lines = text.split(begin)[1].split(end)[0].strip().splitlines()[2:]
    numbers = [field.type in (int, "int") for field in fields(kind)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        kind(*(int(cell) if number else cell for cell, number in zip(line, numbers, strict=True))) for line in cells
    ]


def with_row(text: str, row: AnyRow) -> str:
    """The document with this row in its table, in the order of versions, in place of an older one."""
    kind = type(row)
    begin, end = _markers(kind)
    rows = [*(known for known in read_rows(text, kind) if known.key != row.key), row]
    ordered = sorted(rows, key=lambda row: [[int(part) for part in re.findall(r"\d+", v)] for v in astuple(row)[:2]])
    names = [field.name for field in fields(kind)]
    lines = [names, ["---"] * len(names), *([str(cell) for cell in astuple(row)] for row in ordered)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text.split(begin)[0]}{begin}\n{table}\n{end}{text.split(end)[1]}"


def chosen_combinations(wanted: list[str]) -> list[Combination]:
    """Those of the matrix with these versions, and one for each "NAME=FOLDER"."""
    found = [combination for combination in MATRIX if combination.comfyui in wanted]
    for name, is_folder, folder in (word.partition("=") for word in wanted):
        if is_folder:
            found.append(Combination(name, folder=Path(folder).expanduser().resolve()))
        elif name not in [combination.comfyui for combination in found]:
            raise SetupError(f"--comfyui {name}: neither a version of the matrix nor NAME=FOLDER.")
    return found


def main() -> None:
    """Run the matrix, or a part of it, and write the tables."""
    usage = (
        "%(prog)s [--comfyui VERSION ...] [--comfyui NAME=FOLDER ...] [--editor VERSION ...] [-- PYTEST_ARGUMENT ...]"
    )
    parser = argparse.ArgumentParser(description=__doc__, usage=usage)
    help_ = "only this version, or the ComfyUI in a folder under the name for the table; may be repeated"
    parser.add_argument("--comfyui", action="append", default=[], help=help_)
    parser.add_argument("--editor", action="append", default=[], help="only this version; may be repeated")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, pytest_arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    everything = not options.comfyui and not options.editor
    problems: list[str] = []
    try:
        combinations = list(MATRIX) if everything else chosen_combinations(options.comfyui)
    except SetupError as error:
        sys.exit(f"error: {error}")
    runs = [lambda c=c: run(c, pytest_arguments) for c in combinations]
    runs += [lambda v=v: run_editor(v, pytest_arguments) for v in (EDITORS if everything else options.editor)]
    for one in runs:
        try:
            row = one()
        except SetupError as error:
            problems.append(str(error))
            continue
        if row.failed or not row.passed:
            problems.append(f"{' '.join(map(str, astuple(row)))}: {row.failed} failed")
        PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), row), encoding="utf-8")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
