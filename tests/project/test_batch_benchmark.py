"""The benchmark of `moma_batch` runs in its simulated parts, and its tables read the results. Times are not judged."""

import json
from typing import Any

import batch_table
import pytest
from batch_process import growth
from batch_rows import AFTER, many_rows
from batch_simulated import efficiency, simulated

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


def test_simulated_servers_do_all_rows() -> None:
    found = simulated(2, 6, 0.01, None)
    assert found["servers"] == 2 and found["rows_per_s"] > 0 and 0 < found["whole"] < 1
    assert found["driver_peak_mb"] > 1 and found["driver_cpu_ms_per_row"] > 0


def test_many_rows_are_half_done_and_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_rows.AFTER", 4)
    found = many_rows(80)
    assert AFTER > 4 and found["photos"] == 2 and found["encodings"] == 20
    assert 60 <= found["first"]["tasks"] < 80, "all encodings, half of the pictures, and what ran at that moment"
    assert all(found[part]["start_s"] > 0 and found[part]["peak_mb"] > 1 for part in ("check", "first", "resumed"))


def test_the_document_has_the_tables_of_the_results_files() -> None:
    text = batch_table.DOCUMENT.read_text(encoding="utf-8")
    assert batch_table.with_section(text) == text, "run `python3 benchmarks/batch_table.py`"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in batch_table.RESULTS.glob("*.json")]
    assert found and all(set(batch_table.TABLES) <= set(results) for results in found)


def test_a_document_without_a_place_for_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no place for the tables: lines <!-- benchmarks/batch_table\.py: begin -->"):
        batch_table.with_section("# Title\n")
