"""MoMA beside ControlNet and T2I-Adapter, which ride on the conditionings."""

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.t2i_adapter.adapter
import pytest
import torch

import nodes
from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut
from workbench.tiny_models import TINY, seeded, seeded_weight, unet_config


def seeded_module(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(seeded_weight(51, name, tuple(weight.shape)))
    return module


def tiny_controlnet() -> Any:
    """ComfyUI's own ControlNet of the tiny UNet's layout."""
    settings = unet_config(TINY)
    unused = ("out_channels", "transformer_depth_output", "use_temporal_attention", "adm_in_channels")
    settings = {key: value for key, value in settings.items() if key not in unused}
    net = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3, operations=comfy.ops.manual_cast, device="cpu")
    return comfy.controlnet.ControlNet(seeded_module(net), load_device=torch.device("cpu"))


def tiny_t2i_adapter() -> Any:
    """ComfyUI's own light T2I-Adapter of the tiny UNet's sizes."""
    net = comfy.t2i_adapter.adapter.Adapter_light(cin=192, channels=TINY["block_out_channels"], nums_rb=1)
    return comfy.controlnet.T2IAdapter(seeded_module(net), 3, 8, "nearest-exact")


CONTROLS = {"ControlNet": tiny_controlnet, "T2I-Adapter": tiny_t2i_adapter}


def controlled(make: Any, subject: Any, both: bool) -> tuple[list, list]:
    """Apply ControlNet on the positive, or on both prompts."""
    image = seeded(52, "hint", (1, 64, 64, 3)).sigmoid()
    plus, minus = nodes.ControlNetApplyAdvanced().apply_controlnet(
        positive(subject), negative(), make(), image, 0.5, 0.0, 1.0
    )
    return plus, minus if both else negative()


@pytest.mark.parametrize("name", list(CONTROLS))
@pytest.mark.parametrize("both", [True, False])
def test_control(model: Any, adapter: Any, subject: Any, name: str, both: bool) -> None:
    """MoMA at zero is the controlled picture to the bit; on, it is that of neither alone; batched is one by one."""
    prompts = controlled(CONTROLS[name], subject, both)
    off = moma(model, adapter, subject, weight=0.0, shortcut=tiny_shortcut(strength=0.0))
    on = moma(model, adapter, subject, shortcut=tiny_shortcut())
    theirs = sample(model, *prompts, steps=2)
    assert torch.equal(sample(off, *prompts, steps=2), theirs)
    ours = sample(on, *prompts, steps=2)
    alone = sample(on, positive(subject), negative(), steps=2)
    assert not close(ours, theirs, 1e-2) and not close(ours, alone, 1e-2)
    assert float(masks_of(on, ours)[subject.key].std()) > 0.05
    # The same hint on one row or two: each row gets its own control.
    first = sample(on, *prompts, steps=2, batch=2)
    assert close(first[:1], ours)


def test_the_reference_pass_is_not_controlled(model: Any, subject: Any) -> None:
    """What the layers see of the reference is the same with and without ControlNet."""
    seen: list[torch.Tensor] = []
    for prompts in ((positive(subject), negative()), controlled(tiny_controlnet, subject, True)):
        patched = moma(model, tiny_adapter(), subject, shortcut=tiny_shortcut())
        slot = patched.model_options["transformer_options"]["patches_replace"]["attn1"][("middle", 0)]
        original = slot.add_subjects

        def add_subjects(out: Any, q: Any, k: Any, forward: Any, options: Any, original: Any = original) -> Any:
            seen.append(forward.subjects[0].reference[15][0].clone())
            return original(out, q, k, forward, options)

        slot.add_subjects = add_subjects
        sample(patched, *prompts, steps=1)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
