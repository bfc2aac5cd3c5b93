"""What `docs/batch.md` says of a first run, as written, on a ComfyUI with this pack and nothing else."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer

pytestmark = [pytest.mark.server, pytest.mark.slow]


def blocks() -> list[str]:
    """What is between the fences of the section."""
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    section = text.partition("## A first run")[2].partition("\n## ")[0]
    return re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_the_first_run_of_the_page_paints_its_subjects(place: Any, tmp_path: Path) -> None:
    table, command = blocks()
    words = shlex.split(command)
    assert words[:3] == ["python3", "moma_batch", "run"] and words[4:] == ["--out", "run1"]
    shutil.copytree(ROOT / "weights" / "examples", tmp_path / "weights" / "examples")
    (tmp_path / words[3]).write_text(table, encoding="utf-8")
    base = ComfyServer(comfyui_path(), tmp_path / "base").base  # the pack in its custom_nodes, and no model
    place.out = tmp_path / "run1"
    place.variables |= {"COMFYUI_PATH": str(comfyui_path()), "COMFYUI_PYTHON": sys.executable}
    status, output = place.do("run", words[3], "--comfyui-args", f"--base-directory {shlex.quote(str(base))}")
    assert status == 0, output
    assert output.count("with the small ones of the pack, 128x128 (small_world.json)") == 1
    made = {path.name: np.asarray(Image.open(path)).astype(int) for path in (place.out / "images").iterdir()}
    assert set(made) == {"cup.png", "bag_1.png", "bag_2.png"}
    assert {picture.shape for picture in made.values()} == {(128, 128, 3)}
    assert made["cup.png"][:12].mean() < 60, "the sky of the moon is black"
    assert made["bag_1.png"][-8:].mean() > 150, "the snow is white"


def test_weights_of_ones_own_are_not_passed_over(tmp_path: Path) -> None:
    from moma_batch.models import are_small, may_have_weights

    assert not may_have_weights(tmp_path, [])
    assert may_have_weights(tmp_path, ["--extra-model-paths-config=x.yaml"])
    folder = tmp_path / "other" / "models" / "moma" / "MoMA_llava_7b"
    folder.mkdir(parents=True)
    assert not may_have_weights(tmp_path, ["--base-directory", str(tmp_path / "other")])
    (folder / "attn_adapters_projectors.th").touch()
    assert may_have_weights(tmp_path, ["--base-directory", str(tmp_path / "other")])
    assert not may_have_weights(tmp_path, [])
    (tmp_path / "extra_model_paths.yaml").touch()
    assert may_have_weights(tmp_path, [])
    assert are_small(["moma_mini_adapter.safetensors"]) and not are_small([])
    assert not are_small(["moma_mini_adapter.safetensors", "MoMA_llava_7b/attn_adapters_projectors.th"])
