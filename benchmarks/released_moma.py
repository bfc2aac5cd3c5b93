"""One step of the released MoMA code on the same UNet weights, driven from a checkout of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import CFG, SCHEDULE, Step
from torch import Tensor, autocast
from workload import TEXT_LENGTH, Scene, Workload, subjects

from workbench.released_code import diffusers_unet, import_released, look_at_reference
from workbench.tiny_models import seeded

IMAGE_TOKENS = 4
WORD_TOKENS = [4]
"""Where the subject is in the prompt."""


def released_steps(repo: Path, workload: Workload, scene: Scene, size: tuple[int, int]) -> dict[str, Step]:
    """One step of the released generation loop, and of diffusers without it; the first has run and found the mask.

    The released code can only look at a reference of the new picture's own size, so the reference has that here. (At
    512x512 ours has it too.) The released loop runs under bf16 autocast on a GPU; in fp32 its cross-attention
    projections stay fp16, which it has hard-coded.

    Args:
        size: Latent height and width; both must be the same.

    Raises:
        MissingCodeError: See there.
    """
    code = import_released(repo)
    device = workload.model.load_device
    dtype = workload.model.model.get_dtype()
    weights = workload.model.model.diffusion_model.state_dict()
    unet, plain = (diffusers_unet(workload.unet, weights) for _ in range(2))
    generator = code.generator(unet, device)
    _load_adapter(unet, workload, dtype)
    text = torch.cat([seeded(seed, "text", (1, TEXT_LENGTH, workload.context_size)) for seed in (8, 7)])
    text = text.to(device, dtype)
    tokens = seeded(9, "tokens", (2, IMAGE_TOKENS, workload.context_size)).to(device, dtype)
    mask = subjects(workload, scene)[0].masks[None].to(device, dtype)
    latents = seeded(1, "latents", (1, 4, *size)).to(device, dtype)
    generator.set_selfAttn_strength(1.0)
    with torch.no_grad(), _autocast(text):
        look_at_reference(generator, latents, text[1:], mask, WORD_TOKENS)

    def after() -> None:
        found = code.processors.get_mask_from_cross(unet.attn_processors)[1:]
        generator.set_self_mask("self", "ig", found)
        generator.set_self_mask("cross", mask=found.clone().detach())

    released = _step(
        unet, latents, torch.cat([text, tokens], dim=1), lambda: generator.toggle_enable_flag("all"), after
    )
    released()
    return {"released": released, "released_plain": _step(plain, latents, text, lambda: None, lambda: None)}


def _load_adapter(unet: Any, workload: Workload, dtype: torch.dtype) -> None:
    """Our adapter's projections into the released processors, whose order is the adapter's."""
    for index, processor in enumerate(unet.attn_processors.values()):
        layer = workload.adapter.module.layer(index)
        processor.load_state_dict(layer.state_dict(), strict=False)
        if index % 2 == 0:
            processor.to(dtype)  # cross-attention ones stay in the fp16 that the released code casts to
            processor.scale_learnable.data.fill_(workload.adapter.scales[index // 2])
        processor.requires_grad_(False)


def _step(unet: Any, latents: Tensor, text: Tensor, before: Callable[[], None], after: Callable[[], None]) -> Step:
    """One evaluation with guidance and the scheduler's step, in the middle of the schedule."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(SCHEDULE)
    timestep = scheduler.timesteps[SCHEDULE // 2]

    def step() -> Tensor:
        with torch.no_grad(), _autocast(text):
            before()
            noise = unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=text, return_dict=False)[0]
            negative, positive = noise.chunk(2)
            out = scheduler.step(negative + CFG * (positive - negative), timestep, latents, return_dict=False)[0]
            after()
        return out

    return step


def _autocast(text: Tensor) -> Any:
    return autocast(text.device.type, torch.bfloat16, enabled=text.dtype != torch.float32)
