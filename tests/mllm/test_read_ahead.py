"""Weights of mapped files are read ahead of their use: in the order of use, bounded, ended with the look."""

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.mllm import loading, read_ahead
from comfyui_moma.moma_modules.mllm.checkpoint import read_checkpoint
from comfyui_moma.moma_modules.mllm.encode import forward, looks, subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import LoadedMllm, Mllm, load_checkpoint, load_mllm
from comfyui_moma.moma_modules.mllm.precision import Plan
from comfyui_moma.moma_modules.mllm.read_ahead import THREAD, ReadAhead

from workbench.emulated_card import emulated_cards
from workbench.fake_device import CARD
from workbench.random_weights import llava_folder
from workbench.scene import close

PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
IDS = [1, 5, 9, -200, 7, 8]
CPU = torch.device("cpu")
AT_MOST = 60
"""Seconds after which what does not come has failed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> "Seen":
    """What is read ahead from now on."""
    seen = Seen()

    def noted(part: torch.Tensor) -> None:
        look_at(part)
        seen.note(part)

    look_at = read_ahead.look_at
    monkeypatch.setattr(read_ahead, "look_at", noted)
    return seen


class Seen:
    """Addresses of what was read, in their order."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.changed = threading.Condition()

    def note(self, part: torch.Tensor) -> None:
        with self.changed:
            self.places.append(part.data_ptr())
            self.changed.notify_all()

    def waits_for_more(self, before: int = 0) -> bool:
        """Whether more than so many tensors have been or are being read."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.places) > before, AT_MOST)

    def waits_for(self, tensor: torch.Tensor) -> bool:
        """Whether the beginning of a tensor has been or is being read."""
        with self.changed:
            return self.changed.wait_for(lambda: tensor.data_ptr() in self.places, AT_MOST)


def loaded(folder: Path, plan: Plan | None = None, device: torch.device = CPU) -> LoadedMllm:
    return load_checkpoint(read_checkpoint(folder), plan or Plan(None, torch.float32, ""), device)


def look(model: LoadedMllm) -> torch.Tensor:
    with torch.inference_mode():
        return next(looks(model, "a picture", PIXELS, [IDS]))


def encode(mllm: Mllm) -> torch.Tensor:
    with torch.inference_mode():
        return subject_hidden_state(mllm, np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool), "car", "A car.")


def test_the_language_layers_are_read_while_the_vision_tower_computes(folder: Path, read: Seen) -> None:
    """The tower's second layer waits until the last language layer is read: nobody else would read it."""
    model = loaded(folder)
    last = model.module.language.layers[-1].mlp.down_proj.weight
    found: list[bool] = []
    model.module.vision.encoder.layers[1].register_forward_pre_hook(lambda *_: found.append(read.waits_for(last)))
    look(model)
    assert found == [True]
    weights = {
        weight.data_ptr(): number for number, layer in enumerate(model.module.layers()) for weight in layer.parameters()
    }
    order = [weights[place] for place in read.places if place in weights]
    assert order == sorted(order) and set(order) >= set(range(2, len(model.module.layers())))


def test_the_next_layer_is_read_while_one_computes(folder: Path, read: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one layer; the prompt after the first, which does not look at the picture."""
    model = loaded(folder)
    look(model)
    layers = list(model.module.language.layers)
    size = sum(weight.nbytes for weight in layers[0].parameters())
    monkeypatch.setattr(read_ahead, "AHEAD", size)
    read.places.clear()
    found: list[bool] = []
    early: list[bool] = []
    for number in range(len(layers) - 1):

        def waits(*_: Any, number: int = number) -> None:
            found.append(read.waits_for(layers[number + 1].self_attn.q_proj.weight))
            later = {weight.data_ptr() for layer in layers[number + 2 :] for weight in layer.parameters()}
            early.append(bool(later & set(read.places)))

        layers[number].self_attn.register_forward_pre_hook(waits)
    with torch.inference_mode():
        next(looks(model, "a picture", PIXELS, [[*IDS, 11]]))
    assert found == [True] * 3 and not any(early)


def test_no_number_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        expected = forward(loaded(folder), PIXELS, IDS)
    ahead = look(loaded(folder))
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)  # all is in RAM, nothing is read ahead
    assert torch.equal(ahead, look(loaded(folder))) and close(ahead, expected, 5e-5)


@pytest.mark.parametrize("plan", [Plan("fp8", torch.float32, ""), Plan(None, torch.bfloat16, "", cast_once=True)])
def test_the_next_weights_are_read_while_one_is_packed_or_cast(
    folder: Path, read: Seen, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the weights are loaded, of which each waits for that; the look after it finds all in RAM, reads nothing."""
    fill = loading._fill
    found: list[bool] = []

    def waiting(*given: Any) -> None:
        found.append(all(found) and read.waits_for_more())
        fill(*given)

    monkeypatch.setattr(loading, "_fill", waiting)
    model = loaded(folder, plan)
    assert found and all(found)
    read.places.clear()
    look(model)
    assert not read.places


@pytest.mark.parametrize("budget", [1e32, 0.1], ids=["resident", "streamed"])
def test_only_what_is_not_on_the_card_is_read(folder: Path, read: Seen, budget: float) -> None:
    with torch.inference_mode(), emulated_cards():
        model = loaded(folder, Plan(None, torch.bfloat16, ""), CARD)
        model.patcher.partially_load(CARD, budget)
        before = len(read.places)
        if budget < 1:
            late = model.module.vision.encoder.layers[1]
            late.register_forward_pre_hook(lambda *_: read.waits_for_more(before) and None)
        look(model)
        on_cpu = [weight for layer in model.module.layers() for weight in layer.parameters() if weight.device == CPU]
        assert bool(on_cpu) == (budget < 1)
        assert (len(read.places) > before) == bool(on_cpu)
        model.patcher.detach()


def test_an_error_is_told_and_costs_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "comfyui_moma")
    expected = look(loaded(folder))

    failed = threading.Event()

    def fail(_: torch.Tensor) -> None:
        failed.set()
        raise OSError("the disk is gone")

    monkeypatch.setattr(read_ahead, "look_at", fail)
    model = loaded(folder)
    model.module.vision.encoder.layers[1].register_forward_pre_hook(lambda *_: failed.wait(AT_MOST) and None)
    assert torch.equal(look(model), expected)
    assert caplog.text.count("weights ahead of their use failed") == 1 and "the disk is gone" in caplog.text


def test_cancel_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a layer that would be read for ever."""
    mllm = load_mllm(folder, "fp32")
    reading = threading.Event()
    parts: list[int] = []

    def endless(_: torch.Tensor) -> Iterator[torch.Tensor]:
        while True:
            parts.append(1)
            reading.set()
            yield torch.zeros(1, dtype=torch.uint8)

    monkeypatch.setattr(read_ahead, "_parts", endless)

    def cancel(*_: Any) -> None:
        assert reading.wait(AT_MOST)
        comfy.model_management.interrupt_current_processing(True)

    hook = mllm.loaded.module.vision.encoder.layers[0].register_forward_hook(cancel, prepend=True)
    # The thread may not skip the layer that runs.
    monkeypatch.setattr(ReadAhead, "reached", lambda *_: None)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encode(mllm)
    comfy.model_management.interrupt_current_processing(False)
    hook.remove()
    assert parts and not [thread for thread in threading.enumerate() if thread.name == THREAD]
    assert all(not part._forward_pre_hooks for part in mllm.loaded.module.modules())


def test_no_more_is_read_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [[torch.zeros(1000, dtype=torch.uint8)] for _ in range(20)]
    reached = [-1]
    done: list[int] = []
    came = threading.Condition()

    def noted(part: torch.Tensor) -> None:
        number = next(i for i, (tensor,) in enumerate(steps) if tensor.data_ptr() == part.data_ptr())
        with came:
            done.append(number)
            assert number <= reached[0] + 3
            came.notify_all()

    def is_last(number: int) -> bool:
        return done[-1:] == [number]

    monkeypatch.setattr(read_ahead, "look_at", noted)
    with ReadAhead(steps, limit=3500) as ahead:
        for step in range(-1, 17):
            with came:
                reached[0] = step
            if step >= 0:
                ahead.reached(step)
            with came:
                assert came.wait_for(partial(is_last, step + 3), AT_MOST)
    assert done == list(range(20))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to empty the page cache")
def test_pages_of_the_file_come_into_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "weights", 64 << 20
    path.write_bytes(bytes(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if all(resident(mapped)):
        pytest.skip("this file system keeps its files in memory")
    with ReadAhead([[mapped]], limit=size) as ahead:
        ahead._thread.join(AT_MOST)
    assert all(resident(mapped))


def resident(mapped: torch.Tensor) -> bytes:
    """For each page of a mapping whether it is in memory."""
    pages = (ctypes.c_ubyte * (mapped.nbytes // 4096))()
    found = ctypes.CDLL(None).mincore(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes), pages)
    assert found == 0
    return bytes(page & 1 for page in pages)
