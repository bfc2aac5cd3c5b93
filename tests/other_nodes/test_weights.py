"""MoMA on changed weights: LoRAs, hooks, merges, other precisions, and models that are not wholly on the device."""

from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import SetModelHooksOnCond
from comfy_extras.nodes_model_merging import ModelMergeSimple

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut
from workbench.tiny_models import seeded, tiny_model

LORA_LAYERS = ("attn1_to_k", "attn2_to_q", "attn2_to_k", "attn2_to_v")


def lora_file() -> dict[str, torch.Tensor]:
    """The content of a LoRA file for the first block."""
    tensors = {}
    for layer in LORA_LAYERS:
        name = f"lora_unet_input_blocks_1_1_transformer_blocks_0_{layer}"
        width = 64 if layer in ("attn2_to_k", "attn2_to_v") else 32
        tensors[f"{name}.lora_up.weight"] = 0.3 * seeded(41, f"{layer} up", (32, 4))
        tensors[f"{name}.lora_down.weight"] = 0.3 * seeded(41, f"{layer} down", (4, width))
    return tensors


def with_lora(model: Any) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora_file(), 1.0, 0.0)[0]


def full(model: Any, adapter: Any, subject: Any) -> Any:
    return moma(model, adapter, subject, shortcut=tiny_shortcut())


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{"steps": 2, **kwargs})


def test_lora_before_or_after(model: Any, adapter: Any, subject: Any) -> None:
    before = run(full(with_lora(model), adapter, subject), subject)
    assert torch.equal(run(with_lora(full(model, adapter, subject)), subject), before)
    for other in (full(model, adapter, subject), with_lora(model)):
        assert not close(before, run(other, subject), 1e-2)


def bypassed(model: Any, strength: float = 1.0) -> Any:
    """LoraLoaderBypass: the LoRA beside the weights."""
    return comfy.sd.load_bypass_lora_for_models(model, None, lora_file(), strength, 0.0)[0]


def test_a_lora_in_bypass_mode_is_a_lora(model: Any, adapter: Any, subject: Any) -> None:
    """In the reference pass too, which is made again for another strength."""
    for strength in (1.0, 0.5):
        lora = comfy.sd.load_lora_for_models(model, None, lora_file(), strength, 0.0)[0]
        expected = run(full(lora, tiny_adapter(), subject), subject)
        assert close(run(full(bypassed(model, strength), adapter, subject), subject), expected)
        assert close(run(bypassed(full(model, adapter, subject), strength), subject), expected)
    assert not close(run(full(model, adapter, subject), subject), expected, 1e-2)


def hooked(conditioning: list) -> list:
    hooks = comfy.hooks.create_hook_lora(lora_file(), 1.0, 0.0)
    return SetModelHooksOnCond().attach_hook(conditioning, hooks)[0]


def test_a_lora_hook_on_both_prompts_is_a_lora(model: Any, adapter: Any, subject: Any) -> None:
    """With the image tokens alone. (The reference pass of the shortcut has no prompt, hence no hook: next test.)"""
    patched = moma(model, adapter, subject)
    by_hook = sample(patched, hooked(positive(subject)), hooked(negative()), steps=2)
    assert close(by_hook, run(with_lora(patched), subject), 1e-5)
    assert not close(by_hook, run(patched, subject), 1e-2)
    assert float(masks_of(patched, by_hook)[subject.key].std()) > 0.05


def test_a_lora_hook_on_one_prompt(model: Any, adapter: Any, subject: Any) -> None:
    """The prompts go one by one; the reference is looked at with the model's own weights, in the second run too."""
    seen: list[torch.Tensor] = []

    def reference(patched: Any, *conditionings: list) -> torch.Tensor:
        slot = patched.model_options["transformer_options"]["patches_replace"]["attn1"][("input", 1)]
        original = slot.add_subjects

        def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> torch.Tensor:
            seen.append(forward.subjects[0].reference[0][0].clone())
            return original(out, q, k, forward, extra_options)

        slot.add_subjects = add_subjects
        return sample(patched, *conditionings, steps=2)

    def fresh() -> Any:
        return full(model, tiny_adapter(), subject)  # an adapter of its own: nothing kept from other runs

    one = reference(fresh(), hooked(positive(subject)), negative())
    again = reference(fresh(), hooked(positive(subject)), negative())
    plain = reference(fresh(), positive(subject), negative())
    assert torch.equal(one, again) and not close(one, plain, 1e-2)
    assert all(torch.equal(keys, seen[0]) for keys in seen)


def test_merges(model: Any, adapter: Any, subject: Any) -> None:
    """A merge keeps what is on its first model, before or after our nodes, and drops what is on its second."""
    other = tiny_model()
    with torch.no_grad():
        for name, weight in other.model.diffusion_model.named_parameters():
            weight.copy_(weight + 0.1 * weight.abs().mean() * seeded(43, name, tuple(weight.shape)))
    merge = ModelMergeSimple().merge
    merged = merge(model, other, 0.5)[0]
    after = run(full(merged, adapter, subject), subject)
    assert torch.equal(run(merge(full(model, adapter, subject), other, 0.5)[0], subject), after)
    assert torch.equal(run(merge(model, full(other, adapter, subject), 0.5)[0], subject), run(merged, subject))
    assert not close(after, run(full(model, adapter, subject), subject), 1e-2)
    assert not close(after, run(merged, subject), 1e-2)


PRECISIONS = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp8_e4m3fn": (torch.float8_e4m3fn, torch.float32),
    "fp8_e5m2 in bf16": (torch.float8_e5m2, torch.bfloat16),
}


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_precisions(model: Any, adapter: Any, subject: Any, name: str) -> None:
    """One evaluation's distance from fp32 is at most twice what the precision costs the plain UNet."""
    options = {"steps": 2, "last_step": 1, "cfg": 1.5, "sampler": "euler"}
    coarse = tiny_model(dtype=PRECISIONS[name][0], compute=PRECISIONS[name][1])

    def drift(ours: Any, exact: Any) -> float:
        expected = run(exact, subject, **options)
        result = run(ours, subject, **options)
        assert result.isfinite().all()
        return float((result - expected).norm() / expected.norm())

    plain = drift(coarse, model)
    patched = drift(full(coarse, adapter, subject), full(model, adapter, subject))
    print(f"{name}: {plain:.2e} without MoMA, {patched:.2e} with")
    assert plain > 0 and patched < 2 * plain
    ours = full(coarse, adapter, subject)
    assert not close(run(ours, subject, **options), run(coarse, subject, **options), 1e-2)


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_partly_loaded_models(subject: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """--lowvram and --novram, as ComfyUI loads for them: weights stay off the device and are cast for every layer."""
    management = comfy.model_management
    model, adapter = tiny_model(), tiny_adapter()
    patched = full(with_lora(model), adapter, subject)
    expected = run(patched, subject)
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda _: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    if state == "LOW_VRAM":
        half = model.model_size() // 2
        monkeypatch.setattr(management, "get_free_memory", lambda _=None, both=False: (half, half) if both else half)
    patched = full(with_lora(model), tiny_adapter(), subject)
    partial: list[tuple[bool, bool]] = []

    def look(*_: Any) -> None:
        module = patched.get_additional_models()[0].model
        partial.append(tuple(bool(getattr(m, "model_lowvram", False)) for m in (patched.model, module)))

    ours = run(patched, subject, callback=look)
    management.unload_all_models()
    assert close(ours, expected, 1e-5)
    assert partial and all(unet for unet, _ in partial)
    if state == "NO_VRAM":
        assert all(module for _, module in partial)
