"""The script that runs the tests on several versions: what it chooses to run, and the tables that it writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfyui_source import SetupError, find_comfyui
from compatibility_matrix import PAGE, Combination, EditorRow, Row, chosen_combinations, read_rows, with_row

from workbench.bootstrap import comfyui_path

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("kind", [Row, EditorRow])
def test_a_row_replaces_the_one_of_an_earlier_run(kind: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = read_rows(text, kind)
    assert rows and with_row(text, rows[0]) == text
    changed = with_row(text, replace(rows[0], failed=7))
    assert read_rows(changed, kind) == [replace(rows[0], failed=7), *rows[1:]]


def test_rows_are_in_the_order_of_versions() -> None:
    text = PAGE.read_text(encoding="utf-8")
    row = read_rows(text, Row)[0]
    for version in ("0.100.0+1234abc", "0.9.0"):
        text = with_row(text, replace(row, comfyui=version))
    versions = [row.comfyui for row in read_rows(text, Row)]
    assert (versions[0], versions[-1]) == ("0.9.0", "0.100.0+1234abc")


def test_versions_and_folders_can_be_named() -> None:
    folder = comfyui_path().resolve()
    assert chosen_combinations(["0.26.0", f"0.99.0={folder}"]) == [
        Combination("0.26.0"),
        Combination("0.99.0", folder=folder),
    ]
    with pytest.raises(SetupError, match=r"--comfyui 0\.99\.0: neither a version of the matrix nor NAME=FOLDER\."):
        chosen_combinations(["0.99.0"])


def test_a_folder_without_comfyui_is_refused(tmp_path: Path) -> None:
    assert find_comfyui(comfyui_path()) == comfyui_path()
    with pytest.raises(SetupError, match=r"There is no ComfyUI in "):
        find_comfyui(tmp_path)
