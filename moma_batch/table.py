"""The table: CSV, JSON lines or Parquet, read row by row."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = (
    "id",
    "image",
    "mask",
    "subject",
    "prompt",
    "negative",
    "seed",
    "strength",
    "weight",
    "checkpoint",
    "workflow",
    "subject_file",
    "output",
)
FREE = ("set.", "note.")
"""Columns `set.NODE.INPUT` fill an input of the workflow; `note.ANYTHING` is not read."""
MOST_SEEDS = 10_000
SEED_LIMIT = 2**64
CELL_LIMIT = 1_000_000


class TableError(Exception):
    """The table as a whole cannot be used; the message says why and what to do."""


class RowError(Exception):
    """One row cannot be used; the message names the column, what was found and what to do."""


@dataclass(frozen=True)
class Row:
    """One row: its number (the first below the header is 1), what its cells hold (empty ones left out)."""

    number: int
    values: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows in their order. A row that cannot be read has a `problem`, and those after it are still read.

    Raises:
        TableError: The file is missing, of an unknown kind, or has columns of unknown names.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TableError(f"{path}: a table is a .csv, .jsonl or .parquet file.")
    if not path.is_file():
        raise TableError(f"There is no table {path}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(CELL_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = [name.strip() for name in _header(rows, path)]
        check_columns(header, path)
        number = 0
        while True:
            number += 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, problem=f"line {rows.line_num} is not CSV: {error}")
                continue
            if not any(cell.strip() for cell in cells):
                number -= 1  # an empty line is no row
            elif len(cells) > len(header):
                yield Row(number, problem=f"has {len(cells)} cells for {len(header)} columns: quote cells with commas")
            else:
                yield Row(number, _texts(zip(header, cells, strict=False)))


def _header(rows: Iterator[list[str]], path: Path) -> list[str]:
    try:
        return next(rows)
    except StopIteration:
        raise TableError(f"{path} is empty: the first line names the columns.") from None
    except csv.Error as error:
        raise TableError(f"{path}: the first line is not CSV: {error}") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(number, problem=f"is not JSON: {error}")
                continue
            if not isinstance(found, dict):
                yield Row(number, problem='is no JSON object such as {"id": "a"}')
                continue
            try:
                check_columns(found, path)
                yield Row(number, _texts(found.items()))
            except (TableError, RowError) as error:
                yield Row(number, problem=str(error))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TableError(f"{path}: Parquet needs pyarrow in this Python: pip install pyarrow, or use CSV.") from error
    number = 0
    try:
        file = ParquetFile(path)
        check_columns(file.schema_arrow.names, path)
        for batch in file.iter_batches(1024):
            for found in batch.to_pylist():
                number += 1
                try:
                    yield Row(number, _texts(found.items()))
                except RowError as error:
                    yield Row(number, problem=str(error))
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise TableError(f"{path} cannot be read as Parquet, after {number} rows: {error}") from error


def check_columns(names: Iterable[str], path: Path) -> None:
    """Refuse names that mean nothing, so that a misspelt one does not go unnoticed.

    Raises:
        TableError: Naming them.
    """
    names = list(names)
    unknown = [name for name in names if name not in COLUMNS and not name.startswith(FREE)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if unknown:
        raise TableError(
            f"{path} has the column {unknown[0]!r}. Columns are {', '.join(COLUMNS)}, set.NODE.INPUT for any input of "
            "the workflow, and note.ANYTHING for what is not to be read."
        )
    if twice:
        raise TableError(f"{path} has the column {twice[0]!r} twice.")


def _texts(cells: Iterable[tuple[str, Any]]) -> dict[str, str]:
    values = {}
    for name, value in cells:
        if isinstance(value, dict | list | bytes):
            raise RowError(f"{name} holds {str(value)[:80]}; a cell is a text, a number, true or false")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # where a column of whole numbers has gaps, other tools write 7.0 for 7
        text = json.dumps(value) if isinstance(value, bool) else "" if value is None else str(value)
        if text.strip():
            values[name] = text
    return values


def seeds(text: str | None) -> list[int | None]:
    """The seeds of a row, as in "7", "1;2;3" or "1..4"; [None], the workflow's own, if there are none.

    Raises:
        RowError: The text is something else.
    """
    if text is None:
        return [None]
    found: list[int] = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*(\d{1,20})\s*(?:\.\.\s*(\d{1,20})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < SEED_LIMIT or last - first >= MOST_SEEDS:
            raise RowError(f"seed is {text[:80]!r}; give whole numbers from 0 to 2^64 - 1, as in 7, 1;2;3 or 1..4")
        found += range(first, last + 1)
    if len(set(found)) < len(found) or len(found) > MOST_SEEDS:
        raise RowError(f"seed is {text[:80]!r}; give each seed once, at most {MOST_SEEDS} in a row")
    return list(found)
