"""The one command that makes the small world from nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.mini.checkpoint import load_mini_checkpoint
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.training.export import read_back

from workbench.small_world import ADAPTER, CHECKPOINT, MLLM

pytestmark = [pytest.mark.newest, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in this Python, as its set-up starts it, with a share that is a step or two of each stage."""
    inside = {**os.environ, "COMFYUI_MOMA_INSIDE": os.environ.get("COMFYUI_PATH", str(ROOT.parent.parent))}
    few = ("--anew", "--share", "0.0001", "--pictures", "16", "--threads", "1", "--folder", str(folder))
    command = [sys.executable, ROOT / "training" / "run.py", *few, *words]
    return subprocess.run(command, env=inside, capture_output=True, encoding="utf-8", check=False)


def test_one_command_makes_every_file_from_nothing(tmp_path: Path) -> None:
    made = run(tmp_path)
    assert made.returncode == 0, made.stderr[-3000:]
    files = tmp_path / "export"
    assert f"The small world's files are in {files}." in made.stdout
    published = read_back(files)
    assert published is not None
    seen = {name: getattr(published, name).seen for name in ("vae", "diffusion", "vision", "language", "adapter")}
    assert seen == {"vae": 16, "diffusion": 128, "vision": 32, "language": 128, "adapter": 64}
    load_mini_checkpoint(files / CHECKPOINT)
    mllm, adapter = load_mllm(files / MLLM, "fp32"), load_adapter(files / ADAPTER)
    assert mllm.hidden_size == adapter.sizes.hidden
    for stage in seen:
        assert (tmp_path / stage / "loss.csv").stat().st_size


def test_a_stage_whose_foundation_is_missing_says_which(tmp_path: Path) -> None:
    refused = run(tmp_path, "--stage", "adapter")
    assert refused.returncode == 1
    assert f"stage vae comes before adapter, and {tmp_path} holds nothing of it" in refused.stderr
