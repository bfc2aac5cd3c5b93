"""Prints docs/memory.md's table: what the MLLM takes at the published size, per precision and share of it on the card.

    COMFYUI_PATH=... python scripts/memory_table.py

Computed, not measured: the real code of the pack and of ComfyUI's patcher runs on tensors that have a device and a size
but no content, and what is on the card is added up. Needs no card, no weights and little memory. 4-bit and 8-bit need
bitsandbytes. Not in it: the CUDA context, the allocator's rounding, ComfyUI's transfer buffers (2 at most, of the size
of the largest streamed weight).
"""

from typing import NamedTuple

from comfyui_source import add_workbench

add_workbench()
from workbench.bootstrap import bootstrap

bootstrap()
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_moma.moma_modules.mllm.checkpoint import Checkpoint
from comfyui_moma.moma_modules.mllm.encode import forward
from comfyui_moma.moma_modules.mllm.loading import load_checkpoint
from comfyui_moma.moma_modules.mllm.module import MllmModule
from comfyui_moma.moma_modules.mllm.precision import Plan
from comfyui_moma.moma_modules.mllm.weights import LanguageShape, VisionShape
from sentencepiece import SentencePieceProcessor

from workbench.fake_device import CARD, Usage, fake_card, managed, unet_without_content

LANGUAGE = LanguageShape(4096, 11008, 32, 32, 32, 32000, 1e-5, 10000.0)
VISION = VisionShape(1024, 4096, 23, 16, 14, 336)
IDS = [1] * 20 + [-200] + [1] * 44
"""With 576 image patches, 640 tokens."""

PRECISIONS = {
    "bf16": Plan(None, torch.bfloat16, ""),
    "fp32": Plan(None, torch.float32, ""),
    "fp8": Plan("fp8", torch.bfloat16, ""),
    "8-bit": Plan("8-bit", torch.bfloat16, ""),
    "4-bit": Plan("4-bit", torch.bfloat16, ""),
}


CARDS = (8, 24)
"""GB of the cards for which is computed what stays there while sampling."""


class Row(NamedTuple):
    """Bytes: all weights, the most in use on the card at once, and what stays on each of `CARDS` while sampling."""

    weights: int
    resident_peak: int
    streamed_peak: int
    staying: list[int]


def checkpoint() -> Checkpoint:
    """The released checkpoint's weights without content, in fp16 as it has them."""
    parts: dict[str, dict[str, torch.Tensor]] = {"language": {}, "vision": {}, "projector": {}}
    for key, value in MllmModule(LANGUAGE, VISION).state_dict().items():
        part, _, name = key.partition(".")
        parts[part][name] = torch.empty(value.shape, dtype=torch.float16)
    return Checkpoint("published", {}, LANGUAGE, VISION, **parts, tokenizer=SentencePieceProcessor())


def measure(plan: Plan) -> Row:
    """One load and one forward with everything on the card, one with as little as --novram leaves there."""
    with fake_card() as usage:
        loaded = load_checkpoint(checkpoint(), plan, CARD)
        peaks = []
        for budget in (1e32, 0.1):
            loaded.patcher.partially_load(CARD, budget)
            usage.peak = usage.current
            forward(loaded, torch.empty(1, 3, VISION.image_size, VISION.image_size), IDS)
            peaks.append(usage.peak)
            loaded.patcher.detach()
            assert usage.current == 0
        staying = [_stays(loaded.patcher, usage, size * 10**9) for size in CARDS]
        return Row(loaded.patcher.model_size(), *peaks, staying)


def _stays(patcher: ModelPatcher, usage: Usage, size: int) -> int:
    """What is left of the MLLM on a card of `size` bytes once ComfyUI has loaded SD1.5's UNet after it."""
    with pytest.MonkeyPatch.context() as patch:
        managed(patch, usage, size)
        unet = unet_without_content()
        for model in (patcher, unet):
            comfy.model_management.load_models_gpu([model])
        left = int(patcher.loaded_size())
        comfy.model_management.free_memory(1e30, CARD)
    return left


def main() -> None:
    """Print the table in Markdown."""
    stays = " / ".join(f"{size} GB" for size in CARDS)
    print(f"| precision | weights | peak, all on the card | peak, all streamed | stays while sampling, {stays} card |")
    print("|---|---|---|---|---|")
    for name, plan in PRECISIONS.items():
        row = measure(plan)
        cells = [f"{size / 1e9:.1f} GB" for size in row[:3]]
        cells.append(" / ".join(f"{size / 1e9:.1f}" for size in row.staying) + " GB")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
