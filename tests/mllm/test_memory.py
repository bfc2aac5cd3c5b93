"""The MLLM in ComfyUI's memory management: streaming, sharing, leaving, being cancelled."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.ops
import comfy.utils
import memory_table
import numpy as np
import psutil
import pytest
import torch
from comfyui_moma.moma_modules.mllm import encode as encoding
from comfyui_moma.moma_modules.mllm import loading
from comfyui_moma.moma_modules.mllm.checkpoint import Checkpoint, read_checkpoint
from comfyui_moma.moma_modules.mllm.checkpoint_files import checkpoint_identity
from comfyui_moma.moma_modules.mllm.encode import forward, subject_hidden_state
from comfyui_moma.moma_modules.mllm.leaves import CastLinear
from comfyui_moma.moma_modules.mllm.loading import LoadedMllm, Mllm, load_checkpoint, load_mllm
from comfyui_moma.moma_modules.mllm.precision import Plan

from workbench.fake_device import CARD, fake_card, managed, unet_without_content, without_content
from workbench.random_weights import llava_folder
from workbench.scene import close
from workbench.tiny_models import tiny_model

STORAGES = [None, "fp8", "8-bit", "4-bit"]
BUDGETS = [0.1, 0.2, 0.5, 0.8, 1e32]
"""Of the model's size; 0.1 bytes is what ComfyUI gives with --novram, 1e32 everything."""

REQUESTED = "Requested to load MllmModule"
"""What ComfyUI logs whenever a model is not on its device yet."""

CONSTANTS = 1024
"""Bytes of position numbers and rotary frequencies, which ComfyUI does not count."""

PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
IDS = [1, 5, 9, -200, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    """Each test starts and ends with no model in ComfyUI's list."""
    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()


def budget_of(share: float, size: int) -> float:
    return share * size if 0.1 < share < 1 else share


def load(folder: Path, storage: str | None, device: str = "cpu") -> LoadedMllm:
    return load_checkpoint(read_checkpoint(folder), Plan(storage, torch.float32, ""), torch.device(device))


def encode(mllm: Mllm) -> torch.Tensor:
    with torch.inference_mode():
        return subject_hidden_state(mllm, np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool), "car", "A car.")


@pytest.mark.parametrize("storage", STORAGES)
def test_every_budget_gives_the_same_result(folder: Path, storage: str | None) -> None:
    with torch.inference_mode():
        loaded = load(folder, storage)
        results, sizes = [], []
        for share in BUDGETS:
            loaded.patcher.partially_load(torch.device("cpu"), budget_of(share, loaded.patcher.model_size()))
            sizes.append(loaded.patcher.loaded_size())
            results.append(forward(loaded, PIXELS, IDS))
            loaded.patcher.detach()
    assert sizes == sorted(sizes) and len(set(sizes)) == len(BUDGETS)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_operand_is_on_the_card_at_every_budget(folder: Path, storage: str | None) -> None:
    with fake_card() as usage:
        checkpoint = without_content(read_checkpoint(folder))
        loaded = load_checkpoint(checkpoint, Plan(storage, torch.bfloat16, ""), CARD)
        size = loaded.patcher.model_size()
        for share in BUDGETS:
            loaded.patcher.partially_load(CARD, budget_of(share, size))
            assert loaded.patcher.loaded_size() <= budget_of(share, size)
            assert 0 <= usage.current - loaded.patcher.loaded_size() <= CONSTANTS
            usage.operations.clear()
            usage.peak = 0
            assert forward(loaded, PIXELS, IDS).shape == (1, 128)
            assert usage.operations["aten.silu.default"] == 4  # each layer of the language model
            assert usage.peak <= budget_of(share, size) + 6e6 if share < 1 else usage.peak < size + 6e6
            loaded.patcher.detach()
            assert usage.current == 0
            tensors = (*loaded.module.parameters(), *loaded.module.buffers())
            assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_a_card_gives_back_the_pages_of_the_file(folder: Path) -> None:
    with fake_card():
        loaded = load_checkpoint(without_content(read_checkpoint(folder)), Plan(None, torch.bfloat16, ""), CARD)
        leaf = loaded.module.language.layers[0].mlp.up_proj
        before = leaf.weight.data
        loaded.patcher.partially_load(CARD, 1e32)
        assert leaf.weight.device == CARD
        loaded.patcher.detach()
        assert leaf.weight.data.untyped_storage()._cdata == before.untyped_storage()._cdata


def on_a_card(folder: Path, precision: str) -> Mllm:
    """A handle whose weights, without content, are for the fake card. Within `fake_card`."""
    handle = load_mllm(folder, precision)
    vars(handle)["loaded"] = load_checkpoint(without_content(read_checkpoint(folder)), handle.plan, CARD)
    return handle


def test_cancelling_on_the_way_to_the_card_brings_all_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card() as usage:
        managed(monkeypatch, usage, 24 * 10**9)
        handle = on_a_card(folder, "bf16")
        moved: list[int] = []
        move = CastLinear._apply

        def cancel_at_the_fifth(self: CastLinear, *args: Any) -> Any:
            moved.append(usage.current)
            comfy.model_management.interrupt_current_processing(len(moved) == 5)
            return move(self, *args)

        monkeypatch.setattr(CastLinear, "_apply", cancel_at_the_fifth)
        monkeypatch.setattr(encoding, "_is_sound", lambda _: True)  # Without content, nobody can tell.
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            encode(handle)
        patcher = handle.loaded.patcher
        assert moved[4] > 0 and usage.current == 0 and patcher.loaded_size() == 0
        assert patcher not in loaded_now()
        encode(handle)
        assert patcher in loaded_now() and patcher.loaded_size() == patcher.model_size()
        assert 0 <= usage.current - patcher.loaded_size() <= CONSTANTS
        comfy.model_management.free_memory(1e30, CARD)


def loaded_now() -> list[Any]:
    """What is in ComfyUI's list of models."""
    return [m.model for m in comfy.model_management.current_loaded_models]


@pytest.mark.parametrize("card", [8, 24])
def test_it_makes_room_on_the_card_for_sampling(monkeypatch: pytest.MonkeyPatch, card: int) -> None:
    """At the published size: a look, a UNet that needs 2 GB to compute, another look, loaded as ComfyUI does it."""
    with fake_card() as usage:
        managed(monkeypatch, usage, card * 10**9)
        mllm = load_checkpoint(memory_table.checkpoint(), Plan(None, torch.bfloat16, ""), CARD).patcher
        unet = unet_without_content()
        comfy.model_management.load_models_gpu([mllm])
        looking = mllm.loaded_size()
        comfy.model_management.load_models_gpu([unet], memory_required=2e9)
        assert unet.loaded_size() == unet.model_size()
        assert card * 1e9 - usage.current >= 2e9
        fits = mllm.loaded_size() == mllm.model_size()
        assert fits == (card == 24) and (fits or mllm.loaded_size() < looking - 1e9)
        comfy.model_management.load_models_gpu([mllm])
        assert fits or mllm.loaded_size() > 0.4 * looking
        comfy.model_management.free_memory(1e30, CARD)
        assert usage.current <= CONSTANTS and not loaded_now()


@pytest.mark.parametrize("storage", STORAGES)
def test_dynamic_vram_finds_all_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, storage: str | None) -> None:
    """With it on, ComfyUI's leaves have no weight until they are given one (in 0.16 on Windows only)."""
    with torch.inference_mode():
        expected = forward(load(folder, storage), PIXELS, IDS)
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
        monkeypatch.setattr(comfy.model_management, "WINDOWS", True)
        assert comfy.ops.manual_cast.Linear(2, 2).weight is None
        assert torch.equal(forward(load(folder, storage), PIXELS, IDS), expected)


def test_loading_is_lazy_shared_and_freed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Plan] = []

    def counted(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> LoadedMllm:
        loads.append(plan)
        return load_checkpoint(checkpoint, plan, device)

    monkeypatch.setattr(loading, "load_checkpoint", counted)
    one, two, other = load_mllm(folder, "fp32"), load_mllm(folder, "fp32"), load_mllm(folder, "fp8")
    assert not loads
    for mllm in (one, two, one, other):
        encode(mllm)
    assert [plan.storage for plan in loads] == [None, "fp8"]
    assert one.loaded is two.loaded and one.loaded is not other.loaded
    gone = weakref.ref(one.loaded.module)
    del one, mllm
    gc.collect()
    assert gone() is not None
    del two
    gc.collect()
    assert gone() is None
    assert all(m.model is not None for m in comfy.model_management.current_loaded_models)


@pytest.mark.parametrize("precision", ["fp32", "fp8", "8-bit", "4-bit"])
def test_it_stays_until_room_is_needed_and_comes_back(
    folder: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mllm = load_mllm(folder, precision)
    expected = encode(mllm)
    comfy.model_management.load_models_gpu([tiny_model()])
    assert close(encode(mllm), expected, 5e-5)
    assert mllm.loaded.patcher in loaded_now()
    assert caplog.text.count(REQUESTED) == 1
    comfy.model_management.free_memory(1e30, mllm.loaded.patcher.load_device)
    assert mllm.loaded.patcher not in loaded_now()
    assert close(encode(mllm), expected, 5e-5)
    comfy.model_management.unload_all_models()  # "Unload models" and POST /free, outside of inference mode
    assert mllm.loaded.patcher not in loaded_now()
    assert close(encode(mllm), expected, 5e-5)
    assert caplog.text.count(REQUESTED) == 3


@pytest.mark.parametrize("failure", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_a_failed_look_leaves_it_as_it_was(
    folder: Path, failure: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mllm = load_mllm(folder, "fp32")
    expected = encode(mllm)

    def fail(*_: Any) -> None:
        raise failure

    with mllm.loaded.module.layers()[-1].register_forward_hook(fail), pytest.raises(failure):
        encode(mllm)
    assert loaded_now() == [mllm.loaded.patcher]
    assert all(not part._forward_hooks for part in mllm.loaded.module.modules())
    assert close(encode(mllm), expected, 5e-5)
    assert caplog.text.count(REQUESTED) == 1


def test_nothing_names_it_any_more(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As when ComfyUI's cache drops the loader's result: at once, without ComfyUI's search for leaks."""
    gc.collect()
    gc.disable()
    try:
        mllm = load_mllm(folder, "fp32")
        encode(mllm)
        gone = weakref.ref(mllm.loaded.module)
        del mllm
        assert gone() is None and not loaded_now()
        comfy.model_management.cleanup_models_gc()
    finally:
        gc.enable()
    assert "leak" not in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "8-bit"])
def test_fifty_encodes_keep_nothing(folder: Path, precision: str) -> None:
    mllm = load_mllm(folder, precision)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(5):
        encode(mllm)
    comfy.model_management.free_memory(1e30, mllm.loaded.patcher.load_device)
    before, resident = tensors(), psutil.Process().memory_info().rss
    for _ in range(50):
        encode(mllm)
        comfy.model_management.free_memory(1e30, mllm.loaded.patcher.load_device)
    assert tensors() == before
    assert psutil.Process().memory_info().rss - resident < 16 << 20


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_cancelling_a_load_leaves_nothing(folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[str] = []
    fill = loading._fill

    def cancel_at_the_tenth(module: Any, key: str, *args: Any) -> None:
        filled.append(key)
        comfy.model_management.interrupt_current_processing(len(filled) == 10)
        fill(module, key, *args)

    mllm = load_mllm(folder, precision)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_fill", cancel_at_the_tenth)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            encode(mllm)
    assert len(filled) == 10
    assert "loaded" not in vars(mllm) and not comfy.model_management.current_loaded_models
    assert close(encode(mllm), encode(load_mllm(folder, precision)), 5e-5 if precision == "fp32" else 2e-2)


def test_loading_and_the_forward_show_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total, self.value = total, 0

        def update(self, value: int) -> None:
            self.value += value
            seen.append((self.value, self.total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    mllm = load_mllm(folder, "fp8")
    assert not seen
    encode(mllm)
    weights = len(mllm.loaded.module.state_dict()) - 28  # scales are made, not read
    assert seen == [(i + 1, total) for total in (weights, 3 + 4) for i in range(total)]


def test_identity_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "other name"))
    assert checkpoint_identity(copy) == checkpoint_identity(folder)
    (copy / "attn_adapters_projectors.th").write_bytes(b"an adapter next to it")
    assert checkpoint_identity(copy) == checkpoint_identity(folder)
    changes: dict[str, Callable[[], object]] = {
        "config": lambda: (copy / "config.json").write_text(
            json.dumps({"mm_projector_type": "mlp2x_gelu"}), encoding="utf-8"
        ),
        "tail": lambda: flip(copy / "pytorch_model-00001-of-00002.bin", -1),
        "middle": lambda: flip(copy / "pytorch_model-00002-of-00002.bin", 5000),
    }
    known = {checkpoint_identity(copy)}
    for change in changes.values():
        change()
        known.add(checkpoint_identity(copy))
    assert len(known) == 4


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_large_files_are_sampled_over_their_whole_length(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(12 << 20))
    identities = {checkpoint_identity(file)}
    for place in (0, 5 << 20, (12 << 20) - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([1] * 200_000)[: (12 << 20) - place])
        identities.add(checkpoint_identity(file))
    assert len(identities) == 4
