"""The benchmark of `moma_batch` runs in its simulated parts, and its tables read the results. Times are not judged."""

import os
import re
import sys
from typing import Any

import batch_table
import pytest
from batch_process import growth, measured
from batch_real import small_world
from batch_rows import many_rows
from batch_simulated import efficiency, simulated

from workbench.bootstrap import comfyui_path

pytestmark = [pytest.mark.newest]


def entry(event: str, worker: str, at: float) -> dict[str, Any]:
    return {"event": event, "worker": worker, "at": at}


def test_efficiency_is_service_time_over_servers_and_wall_time() -> None:
    journal = [entry("begin", "a", 10.0), entry("begin", "b", 11.0), entry("end", "a", 14.0), entry("begin", "a", 15.0)]
    journal += [entry("end", "b", 17.0), entry("end", "a", 20.0)]
    log = [{"at": 10.0, "seconds": 4.0}, {"at": 11.0, "seconds": 6.0}, {"at": 15.0, "seconds": 5.0}]
    found = efficiency(journal, log, 2)
    assert found["whole"] == 15 / (2 * 10)
    assert found["steady"] == (3 + 4) / (2 * 4), (
        "from the moment at which b began to that at which the last row was given"
    )


def test_growth_is_that_of_the_second_half() -> None:
    samples = [(float(second), 100.0 if second < 50 else 100.0 + (second - 50) / 3600) for second in range(101)]
    found = growth(samples)
    assert found["tenth_mb"] == found["half_mb"] == 100.0 and abs(found["slope_mb_per_h"] - 1) < 1e-9
    assert growth([]) == {}


def test_the_peak_is_the_process_own_and_not_that_of_who_started_it() -> None:
    held = b"x" * (200 << 20)
    found = measured([sys.executable, "-c", "held = b'x' * (50 << 20); import time; time.sleep(1)"], os.environ)
    assert 50 < found.peak_mb < 150 < len(held) / 1e6


@pytest.fixture(scope="module")
def served() -> dict[str, Any]:
    return simulated(2, 6, 0.01, None)


@pytest.fixture(scope="module")
def many() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batch_rows.AFTER", 4)
        return many_rows(80)


def test_simulated_servers_do_all_rows(served: dict[str, Any]) -> None:
    assert served["servers"] == 2 and served["rows_per_s"] > 0 and 0 < served["whole"] < 1
    assert served["driver_cpu_ms_per_row"] > 0


def test_many_rows_are_half_done_and_gone_on_with(many: dict[str, Any]) -> None:
    assert many["photos"] == 2 and many["encodings"] == 20
    assert 60 <= many["first"]["tasks"] < 80, "all encodings, half of the pictures, and what ran at that moment"
    for part in ("check", "first", "resumed"):
        assert many[part]["start_s"] > 0 and many[part]["start_cpu_s"] > 0 and many[part]["peak_mb"] > 1


@pytest.mark.server
def test_a_run_gives_the_pixels_of_a_bare_loop() -> None:
    found = small_world(3, 2, comfyui_path(), None)
    assert found["same_pixels"] == {"local": 3}
    assert found["loop"]["s_per_row"] > 0 and found["local"]["s_per_row"] > 0


def test_every_part_becomes_a_table(served: dict[str, Any], many: dict[str, Any]) -> None:
    machine = {"cpu": "C", "cores": 2, "python": "3", "ray": "2", "comfyui": "0"}
    memory = {"driver": {"tenth_mb": 30.0, "end_mb": 31.0}, "server": {"tenth_mb": 900.0, "end_mb": 901.0}}
    ways = {"loop": {"s_per_row": 0.5, "memory": {}}, "local": {"s_per_row": 0.6, "memory": memory}}
    real = {"rows": 6, "steps": 2, "load": 1.0, "same_pixels": {"local": 6}, **ways}
    results = {"machine": machine, "dispatch": {"local": served}, "servers": {"ray": [served]}, "rows": many}
    text = batch_table.markdown({**results, "real": real})
    assert all(f"**{title}" in text for title, _ in batch_table.TABLES.values())
    assert "| this machine | 0.600 | +100 ms | 30 MB, 31 MB | 900 MB, 901 MB |" in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "6 rows of 2 steps. With the loop's pixels: this machine 6." in text


def test_the_document_has_the_tables_of_the_results_files() -> None:
    text = batch_table.DOCUMENT.read_text(encoding="utf-8")
    assert batch_table.with_section(text) == text, "run `python3 benchmarks/batch_table.py`"


def test_a_document_without_a_place_for_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no place for the tables: lines <!-- benchmarks/batch_table\.py: begin -->"):
        batch_table.with_section("# Title\n")
