"""Whole runs on emulated graphics cards: every operand where and what it should be, and no wait within a step."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
import torchgen
import yaml
from comfy.ldm.modules.attention import attention_pytorch
from comfyui_moma.moma_modules.comfy_bridge.conditioning import mark_tokens
from comfyui_moma.moma_modules.comfy_bridge.patching import patched, settings_of
from comfyui_moma.moma_modules.subject import combine_subjects
from emulated_card import SECOND, Record, emulated_cards
from fake_device import CARD
from scene import close, masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut, tiny_subject
from tiny_models import seeded, tiny_model

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What a picture may differ from the CPU's: there the shortcut is computed in another order."""

OPERATIONS = {
    *("_to_copy", "_unsafe_view", "alias", "clone", "detach", "detach_", "expand", "lift_fresh", "select", "slice"),
    *("split", "t", "transpose", "unbind", "unsqueeze", "view", "permute", "as_strided", "copy_"),
    *("arange", "ones", "ones_like", "scalar_tensor", "zero_", "zeros", "zeros_like"),
    *("cat", "constant_pad_nd", "index", "index_add_", "stack", "repeat", "upsample_nearest2d"),
    *("add", "add_", "addcmul", "addmm", "bitwise_and", "clamp", "div", "eq", "ge", "gt", "le", "mm", "mul", "sub"),
    *("amax", "amin", "aminmax", "any", "mean", "native_layer_norm", "scaled_dot_product_attention", "sum", "where"),
}
"""All that the pack itself runs on the sampling device. Small, so that every kind of device has each of them."""


@dataclass
class Scene:
    """A MODEL with MoMA on it, and what it is sampled with."""

    model: Any
    positive: list
    size: tuple[int, int] = (8, 8)
    batch: int = 1
    sampler: str = "ddim"
    cfg: float = 7.5

    def sample(self, steps: int = 2) -> torch.Tensor:
        """A run."""
        return sample(
            self.model,
            self.positive,
            negative(),
            size=self.size,
            batch=self.batch,
            steps=steps,
            cfg=self.cfg,
            sampler=self.sampler,
            scheduler="normal",
        )


def everything(model: Any, adapter: Any, batch: int = 2) -> Scene:
    """Two subjects with regions and windows, one of them with two references, on a MODEL with a LoRA; a batch."""
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    model = model.clone()
    model.add_patches({key: ("diff", (0.1 * torch.ones(model.model_state_dict()[key].shape),))})
    car = combine_subjects(tiny_subject(adapter, "car"), tiny_subject(adapter, "car", seed=25))
    dog = tiny_subject(adapter, "dog", seed=15)
    both = replace(
        tiny_shortcut(end=0.9), latent=seeded(6, "latent", (2, 4, 8, 8)), noise=seeded(6, "noise", (2, 4, 8, 8))
    )
    left = torch.zeros(1, 5, 7)
    left[..., :4] = 1
    model = moma(model, adapter, car, shortcut=both)
    model = moma(model, adapter, dog, weight=0.7, shortcut=tiny_shortcut(0.6, region=1 - left, start=0.1))
    settings = settings_of(model)
    entry = settings.subjects[0]
    tokens = replace(entry.image_tokens, window=replace(entry.image_tokens.window, region=left, end=0.8))
    model = patched(model, settings.with_subject(car, adapter, image_tokens=tokens))
    return Scene(model, mark_tokens(positive(car), {dog.key: (9,)}), size=(8, 12), batch=batch)


def simple(model: Any, adapter: Any) -> Scene:
    """One subject with both parts."""
    subject = tiny_subject(adapter)
    return Scene(moma(model, adapter, subject, shortcut=tiny_shortcut()), positive(subject))


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def models() -> Callable[[torch.dtype], Any]:
    """Tiny models by what they compute in."""
    made: dict[torch.dtype, Any] = {}

    def model(dtype: torch.dtype) -> Any:
        if dtype not in made:
            made[dtype] = tiny_model(dtype=dtype)
        return made[dtype]

    return model


@contextmanager
def on(model: Any, adapter: Any, device: torch.device, adapter_device: torch.device) -> Iterator[Any]:
    """The MODEL as ComfyUI's loader would give it on a machine with that device, and the adapter on another."""
    clone = model.clone()
    clone.load_device = device
    # What ComfyUI chooses on a card; on a CPU it would be its own, in pieces.
    clone.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
    )
    before = adapter.patcher.load_device
    adapter.patcher.load_device = adapter_device
    try:
        yield clone
    finally:
        for used in {loaded.device for loaded in comfy.model_management.current_loaded_models}:
            comfy.model_management.free_memory(1e30, used)
        adapter.patcher.load_device = before
        adapter.reference_cache.kept.clear()


@contextmanager
def watched(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Counter[str]]:
    """Every attention projection computes on that device in that dtype; gives how often each did."""
    seen: Counter[str] = Counter()

    def look(name: str) -> Callable[..., None]:
        def check(_: Any, args: Any) -> None:
            seen[name] += 1
            assert (args[0].device, args[0].dtype) == (device, dtype), name

        return check

    ends = ("to_q", "to_k", "to_v", "to_out.0", "to_k_ip", "to_v_ip", "projector.proj")
    found = [(name, leaf) for name, leaf in module.named_modules() if name.endswith(ends)]
    handles = [leaf.register_forward_pre_hook(look(name)) for name, leaf in found]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run(
    make: Callable[[Any, Any], Scene],
    model: Any,
    adapter: Any,
    device: torch.device = CARD,
    adapter_device: torch.device = CARD,
    steps: int = 2,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Record]:
    """Samples, masks, and what happened on the cards."""
    dtype = model.model.get_dtype_inference()
    with (
        emulated_cards() as record,
        on(model, adapter, device, adapter_device) as placed,
        watched(model.model.diffusion_model, device, dtype) as unet,
        watched(adapter.module, adapter_device, dtype) as projections,
    ):
        scene = make(placed, adapter)
        samples = scene.sample(steps)
        assert len(unet) == 16 * 8 and len(projections) == 1 + 32 * 2  # all were used
        return samples, masks_of(scene.model, samples), record


def on_cpu(make: Callable[[Any, Any], Scene], model: Any, adapter: Any, steps: int = 2) -> Any:
    """Samples and masks of the same run without any card."""
    with on(model, adapter, CPU, CPU) as placed:
        scene = make(placed, adapter)
        samples = scene.sample(steps)
        return samples, masks_of(scene.model, samples)


def check(record: Record) -> None:
    """What holds for every run."""
    assert not record.ours(in_step=True)
    assert not record.promotions
    assert torch.float64 not in record.dtypes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_run_on_a_card_is_that_on_the_cpu(models: Any, adapter: Any, dtype: torch.dtype) -> None:
    expected, _ = on_cpu(everything, models(dtype), adapter)
    samples, _, record = run(everything, models(dtype), adapter)
    check(record)
    assert close(samples, expected, TOLERANCE[dtype])


PLACES = {
    "the adapter on the second card": (CARD, SECOND),
    "the MODEL on the second card": (SECOND, CARD),
    "the adapter on the CPU": (CARD, CPU),
    "the MODEL on the CPU": (CPU, CARD),
}


@pytest.mark.parametrize("places", PLACES)
def test_the_adapter_computes_where_it_is(models: Any, adapter: Any, places: str) -> None:
    """Select Model Device moves the MODEL alone. Dynamic VRAM has weights for one card only."""
    device, adapter_device = PLACES[places]
    expected, masks = on_cpu(simple, models(torch.float32), adapter)
    samples, found, record = run(simple, models(torch.float32), adapter, device, adapter_device)
    check(record)
    assert close(samples, expected)
    assert all(close(found[key], mask, 1e-3) for key, mask in masks.items())
