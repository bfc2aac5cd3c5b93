"""What is refused in place of the small world's checkpoint. Whole ones: `tests/training/test_export.py`."""

from pathlib import Path

import pytest
import torch
from comfyui_moma.moma_modules.mini.checkpoint import FORMAT, TEXT, UNET, VAE, is_mini_checkpoint, load_mini_checkpoint
from safetensors.torch import save_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def test_a_checkpoint_of_another_kind_is_refused(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)
    assert not is_mini_checkpoint(path)
    with pytest.raises(ValueError, match=r"some.safetensors is not MoMA's small checkpoint \(its format is None\)"):
        load_mini_checkpoint(path)


def test_a_truncated_file_is_refused(path: Path) -> None:
    path.write_bytes(b"truncated")
    assert not is_mini_checkpoint(path)
    with pytest.raises(ValueError, match="some.safetensors is not a readable"):
        load_mini_checkpoint(path)


@pytest.mark.parametrize("lost", [UNET, TEXT, VAE])
def test_a_checkpoint_without_one_of_its_parts_is_refused(path: Path, lost: str) -> None:
    parts = {start + "weight": torch.zeros(1) for start in (UNET, TEXT, VAE) if start != lost}
    save_file(parts, path, metadata={"format": FORMAT, "text_heads": "4"})
    assert is_mini_checkpoint(path)
    with pytest.raises(ValueError, match=f"no weights that begin with '{lost}'"):
        load_mini_checkpoint(path)
