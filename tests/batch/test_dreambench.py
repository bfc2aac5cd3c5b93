"""`moma_batch table`: folders of DreamBench's form, and of pictures that need masks."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from batch.made_run import scene, square
from PIL import Image

from moma_batch.command_line import main
from moma_batch.dreambench import REMOVER, prompt_class, read_lists
from moma_batch.index import Index
from moma_batch.plan import Planner
from moma_batch.table import read_rows
from moma_batch.workflow import load_workflow
from workbench.bootstrap import comfyui_path

pytestmark = pytest.mark.newest
LISTS = """Classes

subject_name,class
backpack,backpack
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} in a chef outfit'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder as the dataset has it: two subjects of two pictures."""
    folder = tmp_path / "dataset"
    for name in ("backpack", "cat2"):
        (folder / name).mkdir(parents=True)
        for number in (0, 1):
            Image.fromarray(scene((9, 9, 9), (200, 0, 0))).save(folder / name / f"{number:02}.jpg")
    (folder / "prompts_and_classes.txt").write_text(LISTS, encoding="utf-8")
    return folder


def masks(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(square().astype(np.uint8) * 255).save(folder / f"{name}.png")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_subjects_and_prompts_become_rows_of_a_run(bench: Path, tmp_path: Path) -> None:
    masks(bench, "backpack/00_mask", "cat2/00_mask")
    table = tmp_path / "bench.csv"
    assert main(["table", "dreambench", str(bench), "--out", str(table)]) == 0
    found = rows(table)
    assert [(row["id"], row["prompt"], row["note.class"]) for row in found] == [
        ("backpack/01", "a backpack in the jungle", "recontextualization"),
        ("backpack/02", "a red backpack", "property modification"),
        ("backpack/03", "a cube shaped backpack", "property modification"),
        ("cat2/01", "a cat in the snow", "recontextualization"),
        ("cat2/02", "a cat in a chef outfit", "accessorization"),
        ("cat2/03", "a wet cat", "property modification"),
    ]
    assert {row["seed"] for row in found} == {"1..4"} and {row["note.subject"] for row in found} == {"backpack", "cat2"}
    assert found[3]["image"] == "dataset/cat2/00.jpg" and found[3]["mask"] == "dataset/cat2/00_mask.png"
    (tmp_path / "out").mkdir()
    index = Index(tmp_path / "out")
    assert Planner(table, index).plan() == 6
    tasks = list(index.tasks())
    index.close()
    assert len(tasks) == 24 and not [task.message for task in tasks if task.state == "invalid"]


def test_every_picture_and_masks_of_another_folder(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = masks(tmp_path / "elsewhere" / "masks", "backpack/00", "backpack/01", "cat2/00", "cat2/01")
    table = tmp_path / "tables" / "bench.csv"
    words = ["table", "dreambench", str(bench.parent), "--out", str(table), "--masks", str(given), "--every-picture"]
    assert main([*words, "--seeds", "7"]) == 0
    assert f"--inputs {bench.resolve()} --inputs {given.resolve()}" in capsys.readouterr().out
    found = rows(table)
    assert len({row["id"] for row in found}) == 12 and found[3]["id"] == "backpack/01_01"
    assert Path(found[3]["mask"]) == given.resolve() / "backpack" / "01.png" and found[3]["seed"] == "7"
    assert all(not row.problem for row in read_rows(table))


def test_pictures_without_masks_are_named_with_the_ways_out(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks(bench, "backpack/00_mask")
    words = ["table", "dreambench", str(bench), "--out", str(tmp_path / "bench.csv")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "1 pictures have no mask" in error and "00_mask.png" in error and "table masks" in error
    assert not (tmp_path / "bench.csv").exists()
    assert main([*words, "--no-masks"]) == 0 and rows(tmp_path / "bench.csv")[3]["mask"] == ""


def test_a_cut_out_needs_no_mask(bench: Path, tmp_path: Path) -> None:
    for name in ("backpack", "cat2"):
        for path in (bench / name).iterdir():
            path.unlink()
        alpha = square().astype(np.uint8) * 255
        Image.fromarray(np.dstack([scene((9, 9, 9), (1, 1, 1)), alpha])).save(bench / name / "00.png")
    assert main(["table", "dreambench", str(bench), "--out", str(tmp_path / "bench.csv")]) == 0


def test_a_folder_of_another_form_is_named(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path / "bench.csv"), "--no-masks"]
    for change, wanted in (
        (lambda: (bench / "backpack" / "00.jpg").rename(bench / "backpack" / "00.txt"), None),
        (
            lambda: (bench / "backpack" / "01.jpg").unlink(),
            "backpack has no picture, but prompts_and_classes.txt names",
        ),
        (lambda: (bench / "prompts_and_classes.txt").write_text("Classes\n", "utf-8"), "is not of DreamBench's form"),
        (lambda: (bench / "prompts_and_classes.txt").unlink(), "is no DreamBench folder"),
    ):
        change()
        status = main(["table", "dreambench", str(bench), *words])
        assert (status, wanted or "") == (0 if wanted is None else 2, wanted or "")
        assert (wanted or "") in capsys.readouterr().err
    assert main(["table", "dreambench", str(bench), *words, "--seeds", "x"]) == 2
    assert "seed is 'x'" in capsys.readouterr().err


def test_classes_of_prompts_are_those_of_the_paper() -> None:
    assert prompt_class("a {0} {1} wearing a red hat") == "accessorization"
    assert prompt_class("a {0} {1} with a wheat field in the background") == "recontextualization"
    assert prompt_class("a shiny {0} {1}") == "property modification"


def test_lists_may_be_ones_own(tmp_path: Path) -> None:
    text = 'Classes\nmy_dog,dog\nmy_mug,mug\n\nObject Prompts\n"a {0} {1} on a desk".format(a, b),\n'
    (tmp_path / "prompts_and_classes.txt").write_text(text, encoding="utf-8")
    lists = read_lists(tmp_path)
    assert lists.classes == {"my_dog": "dog", "my_mug": "mug"}
    assert lists.prompts("dog") == lists.prompts("mug") == ["a {0} {1} on a desk"]


def test_masks_are_made_by_a_run_of_comfyuis_own_node(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks(bench, "backpack/00_mask")
    table = tmp_path / "masks.csv"
    assert main(["table", "masks", str(bench), "--out", str(table), "--model", "birefnet.safetensors"]) == 0
    assert f"--workflow {REMOVER}" in capsys.readouterr().out
    assert [row["id"] for row in rows(table)] == ["backpack/01", "cat2/00", "cat2/01"]
    (tmp_path / "out").mkdir()
    index = Index(tmp_path / "out")
    assert Planner(table, index, REMOVER).plan() == 3
    assert {task.state for task in index.tasks()} == {"pending"}
    index.close()
    assert main(["table", "masks", str(tmp_path / "out"), "--out", str(table), "--model", "x"]) == 2


def test_the_workflow_that_makes_masks_is_of_nodes_that_this_comfyui_has() -> None:
    """`check` and `run` say so where it has not."""
    import nodes

    graph = load_workflow(REMOVER)
    source = (comfyui_path() / "comfy_extras" / "nodes_bg_removal.py").read_text(encoding="utf-8")
    for node in graph.values():
        assert (
            node["class_type"] in nodes.NODE_CLASS_MAPPINGS
            or f'node_id="{node["class_type"]}"' in source
            or (node["class_type"] == "MaskToImage")
        )
    assert json.loads(REMOVER.read_text("utf-8")) == graph
