"""docs/compatibility.md says what the tests prove. UPDATE_SNAPSHOT=1 writes its tables from `compat_rows.py`."""

import ast
import os

import pytest
from compat_rows import REFUSED, SECTIONS, Row

from workbench import ROOT

pytestmark = pytest.mark.newest

DOCUMENT = ROOT / "docs" / "compatibility.md"
ROWS = [row for rows in SECTIONS.values() for row in rows]


def tables() -> str:
    return "\n".join(_table(title, rows) for title, rows in SECTIONS.items())


def _table(title: str, rows: tuple[Row, ...]) -> str:
    lines = [f"## {title}", "", "| with | | note |", "|---|---|---|"]
    for row in rows:
        quoted = f'"{row.message}"' if row.message else ""
        lines.append(f"| {row.what} | {row.verdict} | {' '.join(part for part in (row.note, quoted) if part)} |")
    return "\n".join([*lines, ""])


def test_the_document_holds_the_rows() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head = text[: text.index("\n## ")]
    expected = f"{head}\n{tables()}"
    if os.environ.get("UPDATE_SNAPSHOT"):
        DOCUMENT.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_every_row_is_proved_by_a_test(row: Row) -> None:
    file, function = row.test.split("::")
    folder, name = file.split("/")
    path = ROOT / "tests" / folder / f"test_{name}.py"
    assert function in {
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    }
    assert row.message or row.verdict != REFUSED
