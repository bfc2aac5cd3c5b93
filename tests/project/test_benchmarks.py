"""The benchmark runs in all its parts on the tiny UNet, and its table reads the results. Times are not judged."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import mllm_files
import mllm_part
import pytest
import run as benchmark
import table
import torch
from arithmetic import matrix_flops
from measure import ratios, with_steps
from parts import PARTS, SHARED
from plan import PLANS, plan_for
from released_moma import released_steps
from session import Session
from workload import Scene, shortcut

from workbench.released_code import MissingCodeError

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(plan_for("tiny", cuda=False), moma_repo=None)


@pytest.fixture(scope="module")
def results(session: Session) -> dict[str, Any]:
    """What `run.py` would write, measured in this process."""
    precisions = ["fp32", "bf16"]
    cases = {
        **{part: ["all"] for part in SHARED},
        "mllm": mllm_part.processes(precisions, full=False, cuda=False)[0],
        "memory": list(session.plan.memory_cases),
        "leak": list(PARTS["leak"].CASES),
    }
    found = {part: {case: PARTS[part].measure(session, case) for case in of_part} for part, of_part in cases.items()}
    return {part: PARTS[part].result(measured) for part, measured in found.items()}


def is_positive(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


@pytest.mark.parametrize(
    ("part", "names"), [("step", ["apply", "shortcut", "both", "ipadapter"]), ("run", ["first", "next"])]
)
def test_ratios_stand_beside_their_baseline(results: dict[str, Any], part: str, names: list[str]) -> None:
    found = results[part]
    assert is_positive(found["plain_s"]) and all(is_positive(found[name]) for name in names)
    for name in names:
        low, high = found["spread"][name]
        assert low <= found[name] <= high


def test_scaling_has_time_and_memory_of_every_group(results: dict[str, Any]) -> None:
    assert set(results["scaling"]) == {"64x64", "128x64", "64x64, batch 2", "64x64, scenes"}
    for group in results["scaling"].values():
        assert is_positive(group["plain_s"]) and is_positive(group["both"]) and is_positive(group["memory"]["plain_mb"])
    assert {"mask 100 %", "2 references", "2 subjects"} <= set(results["scaling"]["64x64, scenes"])


def test_a_step_is_measured_by_the_subjects_share_of_the_picture(results: dict[str, Any]) -> None:
    assert set(results["share"]) == {"64x64, batch 1", "64x64, batch 2"}
    for group in results["share"].values():
        assert all(is_positive(group[name]) for name in ("plain_s", "apply", "shortcut, 25%", "both, 25%"))
    shown = [row.what for row in table.rows(results) if row.part == "share"]
    assert any("both, 25%" in what for what in shown) and not any("plain" in what for what in shown)


def test_a_share_keeps_the_shortcut_to_as_much_of_the_picture(session: Session) -> None:
    for share in (0.1, 0.25):
        region = shortcut(session.workload, Scene(share=share)).window.region
        assert region is not None and float(region.mean()) == pytest.approx(share, rel=0.02)
    assert shortcut(session.workload, Scene()).window.region is None


@pytest.mark.slow
def test_compiled_steps_are_measured() -> None:
    """One graph for each of the two models, and no other one in later steps; in a process with PyTorch's attention."""
    worked = benchmark.work(Namespace(plan="tiny", moma_repo=None), [("compile", "all")])
    found = PARTS["compile"].result(worked["found"]["compile"])
    assert is_positive(found["plain_compiled_s"])
    assert all(is_positive(found[name]) for name in ("plain", "both", "both_compiled"))
    assert found["graphs"] == {"first": 2, "later": 0}
    assert all(len(line) <= 160 for line in table.text_table(table.rows({"compile": found})).splitlines())


def test_a_step_says_what_memory_it_needs_and_how_large_the_subject_was(results: dict[str, Any]) -> None:
    assert set(results["step"]["memory"]) == {"plain_mb", "apply", "shortcut", "both", "ipadapter"}
    assert 0.0 < results["step"]["subject_share"] <= 1.0


def test_parts_of_the_same_machine_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.json"
    benchmark.write(path, {"machine": {"cpu": "A"}, "plan": "full", "leak": {"runs": 1}, "run": {"steps": 2}})
    benchmark.write(path, {"machine": {"cpu": "A"}, "plan": "full", "run": {"steps": 3}, "step": {"rounds": 4}})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["leak"] == {"runs": 1} and found["run"] == {"steps": 3}
    assert list(found) == ["machine", "plan", "step", "run", "leak"]
    benchmark.write(path, {"machine": {"cpu": "B"}, "plan": "full", "run": {"steps": 5}})
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {"machine", "plan", "run"}


def test_the_language_model_is_measured_in_each_precision(results: dict[str, Any]) -> None:
    small = results["mllm"]["small"]
    assert all(set(small[figure]) == {"fp32", "bf16"} for figure in ("load_s", "forward_s", "peak_mb"))
    assert all(is_positive(value) for value in small["forward_s"].values())
    assert small["computed_in"] == {"fp32": "float32", "bf16": "bfloat16"}
    for figure in ("forward_over_arithmetic", "next_prompt", "ten_prompts", "next_over_casting"):
        assert set(small[figure]) == {"fp32", "bf16"} and all(is_positive(ratio) for ratio in small[figure].values())


def test_every_form_of_its_files_is_measured_from_the_disk_and_from_memory(results: dict[str, Any]) -> None:
    files = dict(results["mllm"]["files"])
    assert files.pop("layers") == 4 and set(files) == set(mllm_files.FORMS)
    for figures in files.values():
        assert set(figures) == {"cold_s", "warm_s", "next_s", "peak_mb"}
        assert all(is_positive(figures[figure]) for figure in ("cold_s", "warm_s", "next_s"))
    shown = [row for row in table.rows({"mllm": results["mllm"]}) if " file: " in row.what]
    assert len(shown) == 4 * len(files) - 3  # the bf16 file is the baseline of three


def test_the_products_of_a_computation_are_counted() -> None:
    x, weight = torch.randn(5, 7), torch.randn(11, 7)
    assert matrix_flops(lambda: torch.nn.functional.linear(x, weight)) == 2 * 5 * 7 * 11


def test_a_cpu_measures_full_size_in_fp32_beside_bf16() -> None:
    cases = mllm_part.processes(["bf16", "fp8", "fp32"], full=True, cuda=False)
    assert cases[1:] == [["bf16 1 layers"], ["fp32 1 layers"], ["bf16 5 layers"], ["fp32 5 layers"], ["files 3 layers"]]


def test_a_few_layers_are_extrapolated_to_all() -> None:
    one = {"load_s": 2.0, "computed_in": "float32"}

    def times(look: float) -> dict[str, float]:
        return {"forward_s": look, "next_s": look - 2.0, "ten_s": 2 * look, "cast_s": look - 2.5}

    measured = {
        "fp32 1 layers": {**one, **times(3.0), "peak_mb": 500.0, "flops": 100, "flops_per_s": 50.0},
        "fp32 5 layers": {**one, **times(5.0), "peak_mb": 700.0, "flops": 180, "flops_per_s": 40.0},
        "fp8 1 layers": {"refused": "needs a GPU"},
        "fp8 5 layers": {"refused": "needs a GPU"},
    }
    found = PARTS["mllm"].result(measured)["extrapolated full"]
    assert "load_s" not in found
    assert found["forward_s"] == {"fp32": 3.0 + 31 / 4 * 2.0}
    assert found["peak_mb"] == {"fp32": 500.0 + 31 / 4 * 200.0}
    assert found["arithmetic_s"] == {"fp32": (100 + 31 / 4 * 80) / 50.0}
    assert found["forward_over_arithmetic"] == {"fp32": 18.5 / 14.4}
    assert found["next_prompt"] == {"fp32": 16.5 / 18.5} and found["ten_prompts"] == {"fp32": 2.0}
    assert found["next_over_casting"] == {"fp32": 16.5 / 16.0}
    assert found["computed_in"] == {"fp32": "float32"}
    assert found["refused"] == {"fp8": "needs a GPU"}


def test_runs_leave_nothing_behind(results: dict[str, Any]) -> None:
    counts = results["leak"]["counts"]
    assert counts["wrappers"][0] > 0 and counts["patches"][0] == 32
    assert all(first == last for first, last in (counts[name] for name in ("wrappers", "patches", "callbacks")))
    assert counts["run states"] == [0, 0] and counts["loaded models"][0] == counts["loaded models"][1]


def test_every_part_becomes_rows(results: dict[str, Any]) -> None:
    found = table.rows(results)
    assert {row.part for row in found} == set(PARTS) - {"compile"}
    assert all(len(line) <= 160 for line in table.text_table(found).splitlines())


@pytest.mark.parametrize("path", list(table.DOCUMENTS), ids=lambda path: path.name)
def test_the_documents_have_the_tables_of_the_results_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert table.with_section(text, table.DOCUMENTS[path]) == text, "run `python3 benchmarks/table.py`"


def test_a_readme_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no place for the table: lines <!-- benchmarks/table\.py: begin -->"):
        table.with_section("# Title\n", table.is_in_readme)


def test_ratios_are_taken_within_each_round() -> None:
    assert ratios({"plain": [1.0, 2.0], "both": [3.0, 3.0]}, "plain") == {"both": [3.0, 1.5]}


def test_runs_are_open_at_once_and_end_in_reverse() -> None:
    events: list[str] = []

    def opener(name: str) -> Any:
        def open_run(body: Any) -> None:
            events.append(f"open {name}")
            body(lambda: events.append(f"step {name}"))
            events.append(f"end {name}")

        return open_run

    with_steps({"a": opener("a"), "b": opener("b")}, lambda steps: [steps[name]() for name in ("a", "b", "a")])
    assert events == ["open a", "open b", "step a", "step b", "step a", "end b", "end a"]


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "step,speed"])
    with pytest.raises(SystemExit):
        benchmark.parse_arguments()
    assert (
        "there is no part speed; the parts are step, run, scaling, share, compile, mllm, memory, leak"
        in capsys.readouterr().err
    )


def test_a_folder_that_is_not_the_released_code_is_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(MissingCodeError, match=f"--moma-repo {tmp_path}: No module named 'model_lib'"):
        released_steps(tmp_path, session.workload, Scene(), (8, 8))


def test_plans_measure_every_part() -> None:
    assert set(PARTS) == set(table.NAMES)
    assert all(plan.step_rounds and plan.run_rounds and plan.leak_runs >= 4 for plan in PLANS.values())
