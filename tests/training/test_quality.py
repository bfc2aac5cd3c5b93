"""From what a probe reads to the tables of docs/quality.md."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_moma.training import quality
from comfyui_moma.training.drawn import Read
from PIL import Image

pytestmark = pytest.mark.newest


def read(found: bool, overlap: float | None = 0.5, shape: float = 0.1) -> Read:
    return Read(
        found=found, distance=0.3, aimed=True, sure=0.9, kind=not found, shape=shape, shapes=(0, 0), overlap=overlap
    )


def test_a_row_holds_shares_and_means() -> None:
    row = quality.Row.of("MoMA", [read(True, 0.5, 0.1), read(True, 0.7, 0.3), read(False, None, 0.2)])
    assert (row.pictures, row.found, row.aimed, row.kind) == (3, pytest.approx(2 / 3), 1, pytest.approx(1 / 3))
    assert row.shape == pytest.approx(0.2) and row.overlap == pytest.approx(0.6)
    assert row.line() == "| MoMA | 3 | 67% | 100% | 33% | 0.20 | 0.60 |"


def test_a_row_without_masks_says_nothing_of_them() -> None:
    row = quality.Row.of("the prompt alone", [read(False, None)])
    assert row.overlap is None and row.line().endswith("| 0.10 |  |")


def test_the_page_has_each_table_and_what_it_was_measured_on() -> None:
    options = argparse.Namespace(subjects=50, few=12, seeds=2)
    row = quality.Row("MoMA", 600, 0.81, 0.93, 0.97, 0.08, 0.7)
    shapes = [
        quality.ShapeRow("painted", 8, ((0.2, 0.7), (0.3, 0.8))),
        quality.ShapeRow("MoMA", 8, ((0.4, 0.6), (0.3, 0.6))),
    ]
    page = quality._page(options, {"New context": ("place", [row])}, shapes, {"adapter": 51_000}, 600)
    assert "50 subjects that training never saw" in page and "adapter 51,000" in page and "in 10 minutes" in page
    assert "| | pictures | found | place right | class right | shape | mask |" in page
    assert row.line() in page.splitlines()
    assert "| painted | 8 | 0.20 to 0.70 | 0.30 to 0.80 | 100% |" in page
    assert "| MoMA | 8 | 0.40 to 0.60 | 0.30 to 0.60 | 50% |" in page


def test_a_shape_is_followed_by_what_is_read_of_the_number_that_was_changed() -> None:
    readings = {(number, end): [read(True)] * 2 for number in (0, 1) for end in quality.ENDS}
    low, high = quality.ENDS
    readings[0, high] = [replace(read(True), shapes=(0.4, 9)), replace(read(True), shapes=(0.8, 9))]
    readings[1, low] = [replace(read(True), shapes=(9, 0.1))] * 2
    row = quality.ShapeRow.of("MoMA", readings)
    assert row.pictures == 8 and row.read == ((0, pytest.approx(0.6)), (pytest.approx(0.1), 0))
    assert row.moved == pytest.approx(0.5)


def test_the_curves_are_a_picture_of_both_questions(tmp_path: Path) -> None:
    rows = [quality.Row(f"{s:g}", 10, s, 1 - s, 0.9, 0.1, None) for s in (0.0, 0.5, 1.0)]
    flat = [quality.Row(f"{s:g}", 10, 0.5, 0.5, 0.9, 0.1, None) for s in (0.0, 0.5, 1.0)]
    paths = [tmp_path / name for name in ("curves.png", "flat.png")]
    for path, drawn in zip(paths, (rows, flat), strict=True):
        quality._draw_curves(path, {"By strength": ("place", drawn), "Material": ("material", rows)})
    first, second = (Image.open(path).convert("RGB") for path in paths)
    assert first.size == (900, 340) and first.tobytes() != second.tobytes()
