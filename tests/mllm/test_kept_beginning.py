"""The next prompt of a subject, and several at once, cost their own tokens and give what the whole forward gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.mllm.checkpoint import read_checkpoint
from comfyui_moma.moma_modules.mllm.encode import forward, looks, pixel_values, prompt_ids
from comfyui_moma.moma_modules.mllm.loading import LoadedMllm, load_checkpoint
from comfyui_moma.moma_modules.mllm.precision import Plan

from workbench.random_weights import llava_folder

CPU = torch.device("cpu")
PLANS = {
    "fp32": Plan(None, torch.float32, ""),
    "bf16": Plan(None, torch.bfloat16, ""),
    "fp16": Plan(None, torch.float16, ""),
    "fp8": Plan("fp8", torch.bfloat16, ""),
    "8-bit": Plan("8-bit", torch.bfloat16, ""),
    "4-bit": Plan("4-bit", torch.bfloat16, ""),
}
PROMPTS = [
    "A car in autumn.",
    "A car in the snow, at night.",
    "A",
    "",
    "A car in autumn.",
    "A car in autumn with leaves.",
]
SUBJECTS = ["car", "car", "stuffed animal", "car", "car", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


def load(folder: Path, precision: str = "fp32") -> LoadedMllm:
    return load_checkpoint(read_checkpoint(folder), PLANS[precision], CPU)


@pytest.fixture(scope="module")
def instructions(folder: Path) -> list[list[int]]:
    tokenizer = read_checkpoint(folder).tokenizer
    return [prompt_ids(tokenizer, subject, prompt) for subject, prompt in zip(SUBJECTS, PROMPTS, strict=True)]


def picture(seed: int = 0) -> torch.Tensor:
    image = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    return pixel_values(image, np.ones((64, 64), bool), 112)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("precision", PLANS)
def test_kept_whole_and_packed_give_the_same(folder: Path, instructions: list[list[int]], precision: str) -> None:
    with torch.inference_mode():
        exact = [forward(load(folder), picture(), ids) for ids in instructions]
        whole = [forward(load(folder, precision), picture(), ids) for ids in instructions]
        one = load(folder, precision)
        by_one = [next(looks(one, "a", picture(), [ids])) for ids in instructions]
        packed = list(looks(load(folder, precision), "a", picture(), instructions))
        later = list(looks(one, "a", picture(), instructions))
    noise = max(5e-5, *(distance(rounded, true) for rounded, true in zip(whole, exact, strict=True)))
    for results in (by_one, packed, later):
        worst = max(distance(*pair) for pair in zip(results, whole, strict=True))
        assert worst <= noise
