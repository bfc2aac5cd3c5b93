"""`moma_batch evaluate` as a command on a run's folder: what it writes, that it goes on, and what it says."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batch.made_run import MASK_NODES, WORKFLOW, MadeRun, scene, square, tiny_clip, tiny_dino

from moma_batch.command_line import main
from moma_batch.evaluate.samples import Run
from workbench import ROOT

pytestmark = [pytest.mark.newest, pytest.mark.slow]
PROMPT = "a toy on the beach"
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 220, 20)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name tiny models."""
    place = tmp_path_factory.mktemp("models")
    folders = {
        "clip": tiny_clip(place / "clip"),
        "dino": tiny_dino(place / "dino"),
        "dinov2": tiny_dino(place / "v2", 2),
    }
    return [word for kind, folder in folders.items() for word in (f"--{kind}", str(folder))]


def three_subjects(folder: Path, seeds: Sequence[int] = (1, 2)) -> MadeRun:
    """A run of three subjects, and one row that failed."""
    run = MadeRun(folder)
    for name, colour in COLOURS.items():
        image, mask = run.file(f"{name}.png", scene(colour, (210, 210, 210))), run.file("mask.png", square())
        for seed in seeds:
            row = {"id": f"{name}_{seed}", "image": image, "mask": mask, "prompt": PROMPT, "seed": str(seed)}
            row |= {"strength": "1", "note.subject": name, "note.class": "context"}
            run.add(row, scene(colour, (8 * seed, 100, 200)), square())
    run.fail({**row, "id": "lost", "seed": "9"}, "failed", "the mask is empty")
    return run


def lines(run: Path) -> list[dict[str, str]]:
    with (run / "evaluation" / "figures.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measured(run: Path) -> list[str]:
    """Ids in the order in which they were measured, one for each backbone."""
    text = (run / "evaluation" / "measured.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["id"] for line in text.splitlines() if line.endswith("}")]


def test_every_row_has_its_figures_and_failures_are_listed(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = three_subjects(tmp_path / "run1").write()
    assert main(["evaluate", str(run), *models]) == 1, "a row has no picture"
    assert "lost: failed: the mask is empty" in capsys.readouterr().out
    found = {line["id"]: line for line in lines(run)}
    assert (
        set(found) == {*(f"{name}_{seed}" for name in COLOURS for seed in (1, 2)), "lost"} and found["lost"]["problem"]
    )
    names = [name for name in found["red_1"] if name.endswith("]")]
    assert {name.partition(" [")[0] for name in names} == {
        *("CLIP-I", "CLIP-I subject", "CLIP-I copy", "CLIP-I mask", "CLIP-T", "CLIP-T subject"),
        *(f"{kind}{what}" for kind in ("DINO", "DINOv2") for what in ("", " subject", " copy", " mask")),
    }
    about = json.loads((run / "evaluation" / "evaluation.json").read_text("utf-8"))["backbones"]
    assert [one["name"] for one in about] == sorted({name.partition("[")[2][:-1] for name in names})
    assert all(len(one["sha256"]) == 64 and one["transformers"] for one in about)
    for line in found.values():
        if not line["problem"]:
            assert all(float(line[n]) == pytest.approx(1, abs=1e-5) for n in names if " subject" in n and "-T" not in n)
            assert all(float(line[n]) < 0.9999 for n in names if n.startswith(("CLIP-I [", "DINO [", "DINOv2 [")))
            assert float(line["mask area"]) == pytest.approx(0.25)
    page = (run / "evaluation" / "summary.md").read_text("utf-8")
    assert "6 of 7 pictures measured, 2 seeds" in page and "| lost | failed | the mask is empty |" in page
    assert all(f"## By {one['name']}" in page for one in about)
    assert page.count("| red | 2 |") == page.count("| context | 6 |") == 4
    first = measured(run)
    assert len(first) == 18
    assert main(["evaluate", str(run), *models]) == 1
    assert measured(run) == first, "nothing is measured twice"


def test_what_changed_is_measured_again_and_nothing_else(models: list[str], tmp_path: Path) -> None:
    made = three_subjects(tmp_path / "run1")
    run = made.write()
    assert main(["evaluate", str(run), *models[:2], "--dino", "none", "--dinov2", "none"]) == 1
    assert len(measured(run)) == 6
    made.rows[0]["prompt"] = "a toy in the snow"
    made.write()
    assert main(["evaluate", str(run), *models[:4], "--dinov2", "none"]) == 1
    assert sorted(measured(run)[6:]) == ["blue_1", "blue_2", "green_1", "green_2", "red_1", "red_1", "red_2"]


def test_it_goes_on_after_sigkill(models: list[str], tmp_path: Path) -> None:
    run = three_subjects(tmp_path / "run1", range(1, 27)).write()
    store = run / "evaluation" / "measured.jsonl"
    words = [sys.executable, str(ROOT / "moma_batch"), "evaluate", str(run), *models, "--batch", "1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (store.is_file() and store.read_bytes().count(b"\n") > 12):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with store.open("ab") as file:
        file.write(b'{"event": "figures", "key": "to')  # a line cut off
    before = len(measured(run))
    assert 12 < before < 3 * 78 and not (run / "evaluation" / "figures.csv").exists()
    assert main(["evaluate", str(run), *models]) == 1
    whole = three_subjects(tmp_path / "other" / "run1", range(1, 27)).write()
    assert main(["evaluate", str(whole), *models]) == 1
    assert len(measured(run)) == len(measured(whole)) == 3 * 78
    for line, wanted in zip(lines(run), lines(whole), strict=True):
        for name, value in wanted.items():
            assert line[name] == value or float(line[name]) == pytest.approx(float(value), abs=1e-5), name


def test_masks_of_a_folder_take_the_place_of_those_found(models: list[str], tmp_path: Path) -> None:
    """Also for a graph that finds none, so that two graphs can be held against each other."""
    made = three_subjects(tmp_path / "run1")
    made.workflow = dict(WORKFLOW)
    for path in (tmp_path / "run1" / "images").glob("*~2.png"):
        path.unlink()
    run = made.write()
    rest = [*models[:2], "--dino", "none", "--dinov2", "none"]
    assert main(["evaluate", str(run), *rest]) == 1
    assert "mask area" not in lines(run)[0] and not any("subject [" in name for name in lines(run)[0])
    for name in ("red_1", "red_2", "blue_1"):
        made.file(f"masks/{name}.png", square(64, 0, 0, 64) if name == "red_1" else square())
    assert main(["evaluate", str(run), *rest, "--masks", str(tmp_path / "masks")]) == 1
    found = {line["id"]: line for line in lines(run)}
    assert float(found["red_1"]["mask area"]) == 1 and float(found["red_2"]["mask area"]) == 0.25
    assert "mask: there is no" in found["blue_2"]["problem"]
    assert found["red_2"]["condition masks"] == "given"


def test_an_empty_mask_is_measured_as_no_subject(models: list[str], tmp_path: Path) -> None:
    made = three_subjects(tmp_path / "run1")
    made.file("run1/images/red_1~2.png", ~square(64, 0, 0, 64))
    run = made.write()
    assert main(["evaluate", str(run), *models[:2], "--dino", "none", "--dinov2", "none"]) == 1
    found = {line["id"]: line for line in lines(run)}
    (name,) = [name for name in found["red_1"] if name.startswith("CLIP-I subject")]
    assert float(found["red_1"][name]) < float(found["red_2"][name])
    assert found["red_1"]["mask area"] == "0.0000000"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_what_is_wrong_with_a_run_is_said(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no folder of a run" in said(capsys, "evaluate", str(tmp_path), *models)
    made = three_subjects(tmp_path / "run1")
    made.results[0] |= {"status": "waiting", "picture": "", "sha256": ""}
    run = made.write()
    assert "is unfinished, 1 of 7 pictures are not made" in said(capsys, "evaluate", str(run), *models)
    few = [*models[:2], "--dino", "none", "--dinov2", "none"]
    assert main(["evaluate", str(run), *few, "--so-far"]) == 1
    assert "5 of 7 pictures measured" in capsys.readouterr().out
    (run / "images" / "red_2.png").write_bytes((run / "images" / "blue_1.png").read_bytes())
    (run / "images" / "blue_2.png").unlink()
    (tmp_path / "blue.png").write_bytes(b"no picture")
    assert main(["evaluate", str(run), *few, "--so-far"]) == 1
    out = capsys.readouterr().out
    assert "red_2.png is not the one that the run made" in out and "blue_2.png is not there any more" in out
    assert "blue_1: unmeasured:" in out and "blue.png cannot be read as a picture" in out
    (run / "results.csv").unlink()
    assert "has no results.csv yet" in said(capsys, "evaluate", str(run), *models)


def test_what_is_wrong_with_a_command_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(three_subjects(tmp_path / "run1").write())
    none = ["--dino", "none", "--dinov2", "none"]
    assert "is neither a folder nor in the hub's cache" in said(capsys, "evaluate", run, "--clip", "a/missing", *none)
    assert "nothing is left to measure with" in said(capsys, "evaluate", run, "--clip", "none", *none)
    assert "--device nothing" in said(capsys, "evaluate", run, "--device", "nothing")
    assert "--masks" in said(capsys, "evaluate", run, "--masks", str(tmp_path / "missing"))
    plan = Path(run) / "plan.json"
    content = json.loads(plan.read_text("utf-8"))
    workflow = content.pop("workflow")
    plan.write_text(json.dumps(content), encoding="utf-8")
    assert "does not say which workflow it ran: name it with --workflow" in said(capsys, "evaluate", run)
    assert "is neither a folder" in said(capsys, "evaluate", run, "--workflow", workflow, "--clip", "a/missing", *none)


def test_without_torch_it_says_which_python_has_it(tmp_path: Path) -> None:
    """And the other commands work."""
    run = three_subjects(tmp_path / "run1").write()
    hidden = "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv.pop(1)); "
    hidden += "from moma_batch.command_line import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hidden, str(ROOT), "evaluate", str(run)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "lacks torch. ComfyUI's Python has them" in done.stderr


def test_the_pictures_file_order_is_that_of_the_graph() -> None:
    """Which file of a row is its mask is told by the graph's Save Image nodes, so files come in their order."""
    from moma_batch.jobs import Job
    from moma_batch.server import Server
    from moma_batch.worker import Patience, Worker, WorkerSpec

    content = (ROOT / "weights" / "examples" / "striped_cup.png").read_bytes()

    class Files(Server):
        def output(self, file: object) -> bytes:
            return content

    job = Job("a", ("k",), 1, "p", {**WORKFLOW, **MASK_NODES}, (), False, {}, 1.0)
    outputs = {name: {"images": [{"filename": f"{name}.png", "type": "output"}]} for name in ("22", "13")}
    worker = Worker(WorkerSpec("w", "http://127.0.0.1:1", None, Patience()))
    made = worker._collect(Files("http://127.0.0.1:1"), job, {"outputs": outputs})
    assert [file.name for file in made.files] == ["13.png", "22.png"]


def test_a_run_of_the_tool_is_one_that_can_be_measured(place: Any) -> None:
    table = place.table(
        [["a", "photo.jpg", "cup", "A cup on the moon.", "1;2"], ["b", "none.jpg", "cup", "A cup.", "1"]]
    )
    assert place.do("run", str(table), own=1)[0] == 1, "a row names a file that is not there"
    first, second, lost = Run(place.out).samples()
    assert (first.id, first.seed, second.id, second.seed) == ("a_1", "1", "a_2", "2")
    for sample in (first, second):
        assert not sample.problem and sample.prompt == "A cup on the moon." and sample.reference.is_file()
        assert sample.conditions["sampler_name"] == "ddim" and sample.conditions["ckpt_name"] == "moma_mini.safetensors"
    assert lost.status == "invalid" and "none.jpg" in lost.problem
