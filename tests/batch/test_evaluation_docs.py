"""The commands of `docs/evaluation.md`, as written, one after another."""

import re
import shlex
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from batch.made_run import MadeRun, scene, square, tiny_clip, tiny_dino
from batch.test_dreambench import LISTS
from PIL import Image

from moma_batch.command_line import main
from moma_batch.evaluate.backbones import DEFAULTS
from moma_batch.table import read_rows
from workbench import ROOT

pytestmark = [pytest.mark.newest, pytest.mark.slow]
REVISION = "0123456789abcdef0123456789abcdef01234567"
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


def blocks() -> list[str]:
    """What is between the fences of the page."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks() for line in block.splitlines() if line.startswith("python3 moma_batch ")]
    return [shlex.split(line)[2:] for line in lines]


def in_cache(cache: Path, name: str) -> Path:
    """The folder of a model in a hub's cache."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(REVISION, encoding="utf-8")
    return place / "snapshots" / REVISION


def measured_run(folder: Path, shade: int) -> None:
    """Two subjects, two seeds and two settings, each setting with its own prompt."""
    run = MadeRun(folder)
    for name, colour in COLOURS.items():
        image, mask = run.file(f"{name}.png", scene(colour, (210, 210, 210))), run.file("mask.png", square())
        for seed in (1, 2):
            for strength, prompt in (("0.4", "a toy made of gold"), ("1", "a toy on the beach")):
                row = {"id": f"{name}_{strength}_{seed}", "image": image, "mask": mask, "prompt": prompt}
                row |= {"seed": str(seed), "strength": strength, "weight": "1", "note.class": prompt[6:10].strip()}
                picture = scene(colour, (shade, 100, 50 * seed))
                run.add(row, picture, square())
                run.file(f"masks/images/{row['id']}.png", square())
    run.write()


def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for clip, dino, dinov2 in (
        [in_cache(tmp_path / "hub", DEFAULTS[kind]) for kind in ("clip", "dino", "dinov2")],
        [tmp_path / "models" / kind for kind in ("clip", "dino", "dinov2")],
    ):
        tiny_clip(clip)
        tiny_dino(dino)
        tiny_dino(dinov2, 2)
    for name, shade in (("run1", 30), ("before", 90), ("ipadapter", 200)):
        measured_run(tmp_path / name, shade)
    bench = tmp_path / "dreambooth" / "dataset"
    for name in ("backpack", "cat2"):
        (bench / name).mkdir(parents=True)
        Image.fromarray(scene((9, 9, 9), (200, 0, 0))).save(bench / name / "00.jpg")
        (tmp_path / "masks" / "images" / name).mkdir(parents=True)
        Image.fromarray(square().astype(np.uint8)).save(tmp_path / "masks" / "images" / name / "00.png")
    (bench / "prompts_and_classes.txt").write_text(LISTS, encoding="utf-8")
    seen = set()
    for words in commands():
        seen.add(words[0])
        if words[0] != "run":  # needs a ComfyUI; `tests/batch/test_batch_*.py` run it
            assert main(words) in ((0, 1) if words[0] == "compare" else (0,)), words
    assert seen == {"evaluate", "compare", "study", "table", "run"}
    assert (tmp_path / "comparison" / "study.svg").is_file() and (
        tmp_path / "run1" / "evaluation" / "study.png"
    ).is_file()
    assert len(list(read_rows(tmp_path / "dreambench.csv"))) == 6 and len(list(read_rows(tmp_path / "masks.csv"))) == 2
    text = (tmp_path / "run1" / "evaluation" / "evaluation.json").read_text("utf-8")
    assert REVISION in text


def test_the_pages_table_is_one_that_a_run_takes(tmp_path: Path) -> None:
    (table,) = [block for block in blocks() if block.startswith("id,")]
    (tmp_path / "table.csv").write_text(table, encoding="utf-8")
    rows = list(read_rows(tmp_path / "table.csv"))
    assert [row.values["strength"] for row in rows] == ["0.4", "1"] and not any(row.problem for row in rows)


def test_the_page_names_the_defaults_and_each_measure() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for kind, name in DEFAULTS.items():
        assert f"| `--{kind}` | `{name}` |" in text
