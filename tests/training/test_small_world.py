"""The published small world draws its subjects: held-out ones, asked for in places and of materials."""

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.host.folders import OWN_WEIGHTS
from comfyui_moma.moma_modules.mini.checkpoint import load_mini_checkpoint
from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.training import export
from comfyui_moma.training.small_adapter import questions
from comfyui_moma.training.validation import answered
from comfyui_moma.training.world import SIDE

from workbench.likeness import colour_likeness

pytestmark = [pytest.mark.newest, pytest.mark.slow]


def pixels(picture: torch.Tensor) -> np.ndarray:
    """A picture [3, H, W] in -1..1 as uint8 [H, W, 3]."""
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def drawn() -> list[tuple[float, float, bool]]:
    """Of each question: likeness of the picture without and with MoMA, and whether it asks for a material."""
    asked = questions()
    mllm = load_mllm(OWN_WEIGHTS / export.MLLM, "fp32")
    hidden = [
        subject_hidden_state(mllm, each.picture.numpy(), each.mask.numpy(), each.word, each.prompt) for each in asked
    ]
    model, clip, vae = load_mini_checkpoint(OWN_WEIGHTS / export.CHECKPOINT)
    pictures = answered(asked, hidden, OWN_WEIGHTS / export.ADAPTER, model, clip, vae, SIDE, cfg=4.0)
    middle = np.zeros((SIDE, SIDE), bool)  # All scenes have their subject there.
    middle[40:100, 36:92] = True
    found = []
    for question, both in zip(asked, pictures, strict=True):
        without, with_moma = (
            colour_likeness(pixels(picture), middle, question.picture.numpy(), question.mask.numpy())
            for picture in both
        )
        found.append((without, with_moma, question.strength < 1))
    return found


def test_the_subjects_colours_come_through(drawn: list[tuple[float, float, bool]]) -> None:
    kept = [(without, with_moma) for without, with_moma, material in drawn if not material]
    without, with_moma = np.mean(kept, axis=0)
    assert with_moma > without + 0.07, kept  # 0.098 with the first published weights


def test_a_material_takes_their_place(drawn: list[tuple[float, float, bool]]) -> None:
    kept = np.mean([with_moma for _, with_moma, material in drawn if not material])
    made = np.mean([with_moma for _, with_moma, material in drawn if material])
    assert made < kept, drawn
