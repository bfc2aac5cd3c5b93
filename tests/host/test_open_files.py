"""Files are opened when they must be, and let go of afterwards: on Windows an open one cannot be replaced."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import folder_paths
import psutil
import pytest
import torch
from comfyui_moma.moma_modules.adapter.file import convert_adapter
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.download.release import ADAPTER_NAME, FOLDER
from comfyui_moma.moma_modules.host import weight_files
from comfyui_moma.moma_modules.host.folders import MODELS
from comfyui_moma.moma_modules.mllm.hidden_state_cache import HiddenStateCache
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.moma_modules.subject.file import load_subject, save_subject
from comfyui_moma.nodes.convert import ConvertMllm
from comfyui_moma.nodes.loaders import LoadAdapter, LoadMllm
from safetensors.torch import load_file, save_file

from workbench import ROOT
from workbench.scene import tiny_subject
from workbench.tiny_models import adapter_groups

pytestmark = pytest.mark.skipif(
    not hasattr(psutil.Process, "memory_maps"), reason="only some systems tell what is mapped"
)

CHECKPOINT = ROOT / "tests" / "data" / "mllm" / "tiny56" / "checkpoint"


def held(path: Path) -> bool:
    """Whether this process has a file mapped or open."""
    process = psutil.Process()
    names = [entry.path for entry in process.memory_maps()] + [entry.path for entry in process.open_files()]
    return any(Path(name).name == path.name for name in names)


def test_a_mapped_file_is_noticed(tmp_path: Path) -> None:
    """What `held` looks for is what safetensors does by default."""
    save_file({"x": torch.zeros(100_000)}, tmp_path / "mapped.safetensors")
    kept = load_file(tmp_path / "mapped.safetensors")
    assert held(tmp_path / "mapped.safetensors") and kept


def test_a_loaded_subject_lets_go_of_its_file(adapter: Any, tmp_path: Path) -> None:
    save_subject(tiny_subject(adapter, size=512), tmp_path / "held_subject.safetensors")
    subject = load_subject(tmp_path / "held_subject.safetensors")
    assert not held(tmp_path / "held_subject.safetensors") and subject.masks.any()


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_a_loaded_adapter_lets_go_of_its_file(tmp_path: Path, suffix: str) -> None:
    torch.save(adapter_groups(embedding=48), tmp_path / "held_adapter.th")
    convert_adapter(tmp_path / "held_adapter.th", tmp_path / "held_adapter.safetensors")
    adapter = load_adapter(tmp_path / f"held_adapter{suffix}")
    assert not held(tmp_path / f"held_adapter{suffix}") and adapter.sizes.embedding == 48


def test_a_kept_hidden_state_lets_go_of_its_file(tmp_path: Path) -> None:
    mllm = load_mllm(CHECKPOINT, vision_heads=4)
    picture, mask = torch.zeros(512, 512, 3, dtype=torch.uint8).numpy(), torch.ones(512, 512, dtype=torch.bool).numpy()
    with torch.inference_mode():
        HiddenStateCache(tmp_path).hidden_states(mllm, picture, mask, [("cup", "A cup.")])
        (again,) = HiddenStateCache(tmp_path).hidden_states(mllm, picture, mask, [("cup", "A cup.")])
    (file,) = tmp_path.iterdir()
    assert not held(file) and again.isfinite().all()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each file was read."""
    count: Counter[str] = Counter()
    safe_open, read_json = weight_files.safe_open, weight_files.read_json

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        count[Path(path).name] += 1
        return safe_open(path, *args, **kwargs)

    def counting_json(path: Path) -> dict[str, Any]:
        count[path.name] += 1
        return read_json(path)

    monkeypatch.setattr(weight_files, "safe_open", counting)
    monkeypatch.setattr(weight_files, "read_json", counting_json)
    return count


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with one file of each kind, and one of none."""
    root = tmp_path / "moma"
    (root / "llava").mkdir(parents=True)
    (root / "llava" / "config.json").write_text(json.dumps({"mm_projector_type": "mlp2x_gelu"}), encoding="utf-8")
    groups = ("projectors", "self_cross_attentions", "llm_mapping")
    save_file({f"{group}.x": torch.zeros(1) for group in groups}, root / "adapter.safetensors")
    save_file({"x": torch.zeros(1)}, root / "mllm.safetensors", {"format": "moma_mllm"})
    save_file({"x": torch.zeros(1)}, root / "other.safetensors", {"format": "moma_subject"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, MODELS, ([str(root)], {".th", ".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return root


def offered() -> tuple[set[str], set[str]]:
    """What the nodes offer, as ComfyUI asks for it whenever an editor is loaded."""
    adapters, mllms, sources = (node.GET_SCHEMA().inputs[0].options for node in (LoadAdapter, LoadMllm, ConvertMllm))
    assert mllms == sources
    return set(adapters) - {ADAPTER_NAME}, set(mllms) - {FOLDER}


def test_asking_for_choices_again_opens_nothing(root: Path, opened: Counter[str]) -> None:
    for _ in range(3):
        assert offered() == ({"adapter.safetensors"}, {"mllm.safetensors", "llava"})
    assert opened == dict.fromkeys(["adapter.safetensors", "mllm.safetensors", "other.safetensors", "config.json"], 1)


def test_a_replaced_file_is_seen(root: Path, opened: Counter[str]) -> None:
    offered()
    save_file({"y": torch.zeros(1)}, root / "new.safetensors", {"format": "moma_mllm"})
    os.utime(root / "new.safetensors", ns=(0, time.time_ns() + 10**9))
    (root / "new.safetensors").replace(root / "adapter.safetensors")
    (root / "llava" / "config.json").write_text("{}", encoding="utf-8")
    assert offered() == (set(), {"mllm.safetensors", "adapter.safetensors"})
    assert opened["adapter.safetensors"] == 2 and opened["mllm.safetensors"] == 1


def test_a_file_that_cannot_be_read_now_is_tried_again(root: Path, opened: Counter[str]) -> None:
    adapter = root / "adapter.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[:20])  # being copied
    assert offered()[0] == set()
    adapter.write_bytes(content)
    assert offered()[0] == {"adapter.safetensors"}
    assert weight_files.summary(root / "gone.safetensors") is None
