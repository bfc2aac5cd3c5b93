"""Kept beginnings: bounded, dropped with the model, and no more of them however many prompts are asked."""

import gc
import weakref
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from comfyui_moma.moma_modules.mllm import beginnings
from comfyui_moma.moma_modules.mllm.blocks import product_in_blocks
from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import Mllm, load_mllm
from comfyui_moma.moma_modules.mllm.packed import Packed, common_length

from workbench.random_weights import llava_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


def ask(mllm: Mllm, prompt: str = "A car.", seed: int = 0) -> torch.Tensor:
    image = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    with torch.inference_mode():
        return subject_hidden_state(mllm, image, np.ones((16, 16), bool), "car", prompt)


def count_vision(mllm: Mllm) -> list[int]:
    """Grows by one with each look at a picture."""
    looked: list[int] = []
    mllm.loaded.module.projector.register_forward_hook(lambda *_: looked.append(1))
    return looked


def test_the_picture_is_looked_at_once_until_the_model_is_unloaded(folder: Path) -> None:
    mllm = load_mllm(folder, "fp32")
    first, looked = ask(mllm), count_vision(mllm)
    ask(mllm, "A car in the snow.")
    assert not looked
    comfy.model_management.unload_all_models()  # "Unload models"
    assert mllm.loaded.beginnings.size == 0
    assert torch.equal(ask(mllm), first) and len(looked) == 1


def test_the_longest_unused_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = load_mllm(folder, "fp32")
    ask(mllm)
    one = mllm.loaded.beginnings.size
    monkeypatch.setattr(beginnings, "LIMIT", 2 * one)
    looked = count_vision(mllm)
    for seed in (1, 0, 2, 0, 1):  # the picture 1 goes for 2, and 2 for 1
        ask(mllm, seed=seed)
    assert len(looked) == 3 and one < mllm.loaded.beginnings.size <= 2 * one
    monkeypatch.setattr(beginnings, "LIMIT", 0)
    ask(mllm, seed=9)
    assert len(looked) == 4


def test_memory_is_flat_over_many_prompts(folder: Path) -> None:
    mllm = load_mllm(folder, "fp32")
    ask(mllm)
    size = mllm.loaded.beginnings.size

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    ask(mllm, "A car, number 0.")
    before = tensors()
    for number in range(200):
        ask(mllm, f"A car, number {number}.")
    assert tensors() == before and mllm.loaded.beginnings.size == size


def test_they_go_with_the_model(folder: Path) -> None:
    mllm = load_mllm(folder, "fp32")
    ask(mllm)
    gone = weakref.ref(mllm.loaded.beginnings)
    del mllm
    gc.collect()
    assert gone() is None


def test_on_a_card_they_outlive_the_room_made_for_a_sampler(folder: Path) -> None:
    mllm = load_mllm(folder, "fp32")
    ask(mllm)
    kept, patcher = mllm.loaded.beginnings, mllm.loaded.patcher
    kept._on_cpu = False  # as its patcher's device says on a card
    with CurrentNodeContext("prompt", "sampler"):
        patcher.detach()
    assert kept.size
    patcher.detach()
    assert not kept.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8])
def test_products_in_blocks_are_the_product(stored: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(600, 64, generator=generator) * 20).to(stored)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    scale, bias = torch.rand(600, generator=generator), torch.randn(600, generator=generator).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double() * scale.double()[:, None], bias.double())
    ours = product_in_blocks(x, weight, scale, bias)
    assert ours.dtype == dtype
    assert float((ours.double() - expected).norm() / expected.norm()) < {4: 1e-6, 2: 6e-3}[dtype.itemsize]


def test_every_value_of_fp8_is_read() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    ours = product_in_blocks(torch.ones(1, 1), weight, None, None)[0]
    assert torch.equal(ours.isnan(), weight.float()[:, 0].isnan())
    assert torch.equal(ours.nan_to_num(), weight.float()[:, 0].nan_to_num())


def test_an_ending_sees_the_beginning_and_itself() -> None:
    packed = Packed(before=1, beginning=2, endings=(2, 1))
    seen = (packed.mask(torch.float32)[0, 0] == 0).int().tolist()
    assert seen == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert packed.positions().tolist() == [[1, 2, 3, 4, 3]] and packed.last_tokens() == [3, 4]
    assert common_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
