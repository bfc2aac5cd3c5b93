"""Tables in Parquet, as other tools write them, read by a Python that has pyarrow and nothing else."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfyui_source import SetupError
from setup_env import ensure_pyarrow

pytestmark = [pytest.mark.newest, pytest.mark.slow]
WRITE = """
import datetime, sys
import pyarrow as pa
from pyarrow import parquet
when = [[datetime.datetime(2026, 1, 1)], None, None]
columns = {
    "id": pa.array(["a", "b", "c"]),
    "image": pa.array(["photo.jpg"] * 3).dictionary_encode(),
    "subject": pa.array(["cup"] * 3),
    "prompt": pa.array(["a cup", None, "caf\\u00e9"]),
    "seed": pa.array([7.0, None, 9.0]),
    "strength": pa.array([0.5, 1.0, None]),
    "set.5.cache": pa.array([True, False, None]),
    "note.when": pa.array([when[0][0], None, None]),
}
parquet.write_table(pa.table(columns), sys.argv[1])
parquet.write_table(pa.table({**columns, "negative": pa.array(when)}), sys.argv[2])
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """A Python with pyarrow."""
    try:
        return ensure_pyarrow()
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def tables(place: Any, python: Path) -> tuple[Path, Path]:
    """A good table, and one whose first row has a cell that is a list."""
    good, nested = place.folder / "table.parquet", place.folder / "nested.parquet"
    subprocess.run([str(python), "-c", WRITE, str(good), str(nested)], check=True)
    place.python = str(python)
    return good, nested


def test_a_table_in_parquet_gives_the_pictures_of_one_in_csv(place: Any, tables: tuple[Path, Path]) -> None:
    url, _ = place.server()
    assert place.do("run", str(tables[0]), "--server", url)[0] == 0
    keys = {found["id"]: found["key"] for found in place.results()}
    columns = ("id", "image", "subject", "prompt", "seed", "strength", "set.5.cache")
    rows = (
        ("a", "photo.jpg", "cup", "a cup", "7", "0.5", "true"),
        ("b", "photo.jpg", "cup", "", "", "1", "false"),
        ("c", "photo.jpg", "cup", "caf\u00e9", "9", "", ""),
    )
    place.out = place.folder / "other"
    assert place.do("run", str(place.table(rows, columns)), "--server", url)[0] == 0
    assert keys == {found["id"]: found["key"] for found in place.results()}


def test_a_cell_that_is_a_list_costs_its_row_alone(place: Any, tables: tuple[Path, Path]) -> None:
    status, output = place.do("check", str(tables[1]), "--server", place.server()[0])
    assert status == 1 and "row 1 (row000001): negative holds [datetime.datetime(2026" in output
    assert "3 rows: 3 pictures" in output and "1 rows cannot be used" in output


def test_a_damaged_file_is_named(place: Any, tables: tuple[Path, Path]) -> None:
    tables[0].write_bytes(tables[0].read_bytes()[:-20])
    status, output = place.do("check", str(tables[0]), "--server", "http://127.0.0.1:1")
    assert status == 2 and f"{tables[0]} cannot be read as Parquet, after 0 rows" in output


def test_without_pyarrow_its_package_is_named(place: Any) -> None:
    (place.folder / "table.parquet").write_bytes(b"PAR1")
    status, output = place.do("check", str(place.folder / "table.parquet"), "--server", "http://127.0.0.1:1")
    assert status == 2 and "pip install pyarrow, or use CSV" in output
