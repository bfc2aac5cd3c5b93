"""Runs the core tests on several ComfyUI and transformers releases: `python3 scripts/compatibility_matrix.py`.

The core is everything but the slow and the browser tests. The results go into the table of
docs/compatibility_versions.md; rows of combinations that did not run stay as they are.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from comfyui_source import NEWEST, OLDEST, ROOT, SetupError
from setup_env import Environment, environment

TABLE = ROOT / "docs" / "compatibility_versions.md"
BEGIN, END = "<!-- matrix: written by scripts/compatibility_matrix.py -->", "<!-- end of matrix -->"
CORE = "not slow and not browser"
OLDEST_TRANSFORMERS = "4.50.3"
"""What the requirements of the oldest ComfyUI accept."""


@dataclass(frozen=True)
class Combination:
    """A ComfyUI version, and a transformers release; None for the newest that ComfyUI's requirements give."""

    comfyui: str
    transformers: str | None = None


MATRIX = (
    Combination(OLDEST, OLDEST_TRANSFORMERS),
    Combination(OLDEST),
    Combination("0.20.1"),
    Combination("0.26.0"),
    Combination(NEWEST, OLDEST_TRANSFORMERS),
    Combination(NEWEST),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

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


def run(combination: Combination, pytest_arguments: list[str]) -> Row:
    """Set up, run the core tests with their output shown, and count.

    Raises:
        SetupError: The environment cannot be made, or pytest did not get as far as a report.
    """
    pins = [f"transformers=={combination.transformers}"] if combination.transformers else []
    found = environment(combination.comfyui, pins)
    print(f"\n=== ComfyUI {found.name} ===", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [found.python, "-m", "pytest", "-q", "-m", CORE, f"--junitxml={report}", *pytest_arguments]
        status = subprocess.run(command, cwd=ROOT, env=found.variables(), check=False).returncode
        if status not in (0, 1) or not report.is_file():  # 1: some tests failed; other ones mean that it did not run
            raise SetupError(f"pytest ended with status {status} on ComfyUI {found.name}, see its output above.")
        passed, failed = _counts(report)
    transformers, torch, python = _versions(found)
    return Row(combination.comfyui, transformers, torch, python, passed, failed, time.strftime("%Y-%m-%d"))


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


def read_rows(text: str) -> list[Row]:
    """The rows between the markers."""
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(*line[:4], int(line[4]), int(line[5]), line[6]) for line in cells]


def with_rows(text: str, rows: list[Row]) -> str:
    """The document with these rows between the markers, in the order of versions."""
    ordered = sorted(rows, key=lambda row: [[int(part) for part in v.split(".")] for v in astuple(row)[:2]])
    names = [field.name for field in fields(Row)]
    lines = [names, ["---"] * len(names), *([str(cell) for cell in astuple(row)] for row in ordered)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{table}\n{END}{text.split(END)[1]}"


def main() -> None:
    """Run the matrix, or a part of it, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [--comfyui VERSION ...] [-- PYTEST_ARGUMENT ...]"
    )
    versions = sorted({combination.comfyui for combination in MATRIX})
    parser.add_argument("--comfyui", action="append", choices=versions, help="only this version; may be repeated")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    chosen = [c for c in MATRIX if not options.comfyui or c.comfyui in options.comfyui]
    problems: list[str] = []
    for combination in chosen:
        try:
            row = run(combination, sys.argv[split + 1 :])
        except SetupError as error:
            problems.append(str(error))
            continue
        if row.failed or not row.passed:
            problems.append(f"ComfyUI {row.comfyui} with transformers {row.transformers}: {row.failed} failed")
        text = TABLE.read_text(encoding="utf-8")
        kept = [known for known in read_rows(text) if known.key != row.key]
        TABLE.write_text(with_rows(text, [*kept, row]), encoding="utf-8")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
