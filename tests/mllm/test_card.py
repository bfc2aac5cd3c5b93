"""Looks of the language model on an emulated card: the CPU's results, all operands on the card, no wait within."""

from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfyui_moma.moma_modules.mllm.checkpoint import read_checkpoint
from comfyui_moma.moma_modules.mllm.encode import forward, looks
from comfyui_moma.moma_modules.mllm.loading import LoadedMllm, load_checkpoint
from comfyui_moma.moma_modules.mllm.precision import Plan

from workbench.emulated_card import SECOND, emulated_cards
from workbench.fake_device import CARD
from workbench.random_weights import llava_folder
from workbench.scene import close, tiny_adapter

PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
IDS = [1, 5, 9, -200, 7, 8]

PLANS = {
    "fp32": Plan(None, torch.float32, ""),
    "bf16": Plan(None, torch.bfloat16, ""),
    "fp16": Plan(None, torch.float16, ""),
    "fp8": Plan("fp8", torch.bfloat16, ""),
    "8-bit": Plan("8-bit", torch.float16, ""),
    "4-bit": Plan("4-bit", torch.bfloat16, ""),
}
EVERYTHING, NOTHING = 1e32, 0.1
"""Bytes of weights that stay on the card; the others are brought for each layer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


@pytest.mark.parametrize("budget", [EVERYTHING, NOTHING], ids=["resident", "streamed"])
@pytest.mark.parametrize("precision", PLANS)
def test_a_look_on_a_card_is_that_on_the_cpu(folder: Path, precision: str, budget: float) -> None:
    plan = PLANS[precision]
    with torch.inference_mode():
        expected = forward(load_checkpoint(read_checkpoint(folder), plan, torch.device("cpu")), PIXELS, IDS)
        with emulated_cards() as record:
            loaded = load_checkpoint(read_checkpoint(folder), plan, CARD)
            loaded.patcher.partially_load(CARD, budget)
            record.waits.clear()
            hidden = forward(loaded, PIXELS, IDS)
            waits = record.ours(in_step=False)
            loaded.patcher.detach()
    assert hidden.device.type == "cpu" and hidden.dtype == torch.float32
    assert close(hidden, expected, 1e-4 if precision == "fp32" else 0.1)
    back = {what: count for what, count in waits.items() if not what.startswith("cpu to cuda")}
    assert back == {"cuda to cpu at moma_modules/mllm/encode.py:forward": 1}  # the result
    assert not any("leaves.py" in what for what in waits)  # what is streamed comes while the card computes


@pytest.mark.parametrize("budget", [EVERYTHING, NOTHING], ids=["resident", "streamed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_several_instructions_at_once_on_a_card_are_those_on_the_cpu(
    folder: Path, precision: str, budget: float
) -> None:
    plan = PLANS[precision]

    def asked(loaded: LoadedMllm) -> list[torch.Tensor]:
        """Two behind a beginning that is computed with them, then two behind what is kept of it."""
        first = looks(loaded, "a picture", PIXELS, [[*IDS, 11, 12], [*IDS, 13]])
        return [*first, *looks(loaded, "a picture", PIXELS, [[*IDS[:-1], 20], [*IDS, 11]])]

    with torch.inference_mode():
        expected = asked(load_checkpoint(read_checkpoint(folder), plan, torch.device("cpu")))
        with emulated_cards() as record:
            loaded = load_checkpoint(read_checkpoint(folder), plan, CARD)
            loaded.patcher.partially_load(CARD, budget)
            record.waits.clear()
            hidden = asked(loaded)
            waits = record.ours(in_step=False)
            loaded.patcher.detach()
    for ours, theirs in zip(hidden, expected, strict=True):
        assert ours.device.type == "cpu" and close(ours, theirs, 1e-4 if precision == "fp32" else 0.1)
    back = [what for what in waits if not what.startswith("cpu to cuda")]
    assert back and all("mllm/encode.py" in what for what in back)  # results, and what is kept, once they are there
    assert not any("leaves.py" in what or "key_values.py" in what for what in waits)


def test_a_hidden_state_is_mapped_where_the_adapter_is() -> None:
    adapter = tiny_adapter()
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = adapter.map_hidden_state(hidden)
        comfy.model_management.unload_all_models()
        with emulated_cards():
            adapter.patcher.load_device = SECOND
            for given in (hidden, hidden.to(CARD, torch.bfloat16)):
                mapped = adapter.map_hidden_state(given)
                assert mapped.device.type == "cpu" and close(mapped, expected, 2e-2)
            comfy.model_management.free_memory(1e30, SECOND)
