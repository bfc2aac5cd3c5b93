"""Attention slots shared with others: what was in one before, and what is added to it later."""

from typing import Any

import pytest
import torch

from workbench.scene import moma, run, tiny_shortcut
from workbench.tiny_models import tiny_model

PLACES = ((("input", 1), None), (("input", 1), 0))


def halved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
    """Somebody else's attention replacement."""
    from comfyui_moma.moma_modules.sampling.attention import plain_attention

    return 0.5 * plain_attention(q, k, v, extra_options)


@pytest.mark.parametrize("slot", ["attn1", "attn2"])
@pytest.mark.parametrize(("place", "index"), PLACES)
def test_what_sat_in_the_slot_still_runs(
    model: Any, adapter: Any, subject: Any, slot: str, place: tuple[str, int], index: int | None
) -> None:
    """With MoMA off, its patches give exactly what the replacement before them gives."""
    other = model.clone()
    getattr(other, f"set_model_{slot}_replace")(halved, *place, index)
    expected = run(other, subject)
    assert not torch.equal(expected, run(model, subject))
    off = moma(other, adapter, subject, weight=0.0, shortcut=tiny_shortcut(strength=0.0))
    assert torch.equal(run(off, subject), expected)
    on = moma(other, adapter, subject, shortcut=tiny_shortcut())
    assert not torch.equal(run(on, subject), run(moma(model, adapter, subject, shortcut=tiny_shortcut()), subject))


@pytest.mark.parametrize("slot", ["attn1", "attn2"])
def test_callbacks_can_be_added_as_ipadapter_does(model: Any, adapter: Any, subject: Any, slot: str) -> None:
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    before = run(patched, subject)
    clone = patched.clone()
    called: list[float] = []

    def added(out: torch.Tensor, q: Any, k: Any, v: Any, extra_options: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        called.append(kwargs["weight"])
        return kwargs["weight"] * out

    patch = clone.model_options["transformer_options"]["patches_replace"][slot][("input", 1)]
    patch.add(added, weight=0.5, sigma_start=1e9, sigma_end=0.0)
    changed = run(clone, subject)
    assert called and set(called) == {0.5} and not torch.equal(changed, before)
    assert torch.equal(run(patched, subject), before), "adding to a clone must leave the original alone"
    again = moma(clone, adapter, subject)
    assert torch.equal(run(again, subject), changed), "MoMA applied again must keep what was added"


def test_added_callbacks_keep_to_their_noise_range(model: Any, adapter: Any, subject: Any) -> None:
    clone = moma(model, adapter, subject).clone()
    called: list[int] = []
    patch = clone.model_options["transformer_options"]["patches_replace"]["attn2"][("input", 1)]
    patch.add(lambda out, *_, **__: called.append(1) or out, sigma_start=5.0, sigma_end=1.0)
    steps: list[float] = []
    run(clone, subject, steps=6, callback=lambda *_: steps.append(len(called)))
    assert steps[0] == 0 and 0 < steps[-1] < 6


class Owner:
    """A replacement with weights of its own, which ComfyUI must move, load and let go of."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.patcher = tiny_model()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        self.calls.append("attention")
        return halved(q, k, v, extra_options)

    def to(self, device_or_dtype: Any) -> "Owner":
        self.calls.append("to")
        return self

    def models(self) -> list[Any]:
        return [self.patcher]

    def cleanup(self) -> None:
        self.calls.append("cleanup")


@pytest.mark.parametrize("slot", ["attn1", "attn2"])
def test_comfyui_reaches_what_sat_in_the_slot(model: Any, adapter: Any, subject: Any, slot: str) -> None:
    owner = Owner()
    other = model.clone()
    getattr(other, f"set_model_{slot}_replace")(owner, "input", 1)
    patched = moma(other, adapter, subject, shortcut=tiny_shortcut())
    assert owner.patcher in patched.model_patches_models()
    run(patched, subject)
    assert {"to", "attention"} <= set(owner.calls)
    if hasattr(model, "model_patches_call_function"):  # ComfyUI from 0.20 on
        assert owner.calls[-1] == "cleanup"


def test_self_attention_is_left_to_others_where_there_is_no_shortcut(model: Any, adapter: Any, subject: Any) -> None:
    """Some packs take only slots that are free."""
    replaced = moma(model, adapter, subject).model_options["transformer_options"]["patches_replace"]
    assert "attn1" not in replaced and len(replaced["attn2"]) == 16
    with_shortcut = moma(model, adapter, subject, shortcut=tiny_shortcut())
    assert len(with_shortcut.model_options["transformer_options"]["patches_replace"]["attn1"]) == 16
