"""The released MoMA code on the same UNet weights, driven from a checkout of it.

It needs diffusers, which neither ComfyUI nor the pack has: put it into a folder of its own and that into PYTHONPATH,
as in `pip install --no-deps --target DIR diffusers importlib_metadata zipp`. The language model's part of the released
code (and so the llava package) is not imported.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import CFG, SCHEDULE, Step
from torch import Tensor, autocast
from workload import TEXT_LENGTH, Scene, Workload, subjects

from workbench.tiny_models import seeded, unet_config

IMAGE_TOKENS = 4
WORD_TOKENS = [[4]]
"""Where the subject is in the prompt, as `set_cross_subject_idxs` takes it."""


class MissingCodeError(Exception):
    """The checkout or diffusers cannot be imported."""


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
    generator_class, mask_from_cross = _import(repo)
    device = workload.model.load_device
    dtype = workload.model.model.get_dtype()
    unet, plain = (_unet(workload) for _ in range(2))
    generator = generator_class.__new__(generator_class)  # its own set-up loads a pipeline from the hub
    generator.unet, generator.device = unet, device
    generator.set_ip_adapter()
    _load_adapter(unet, workload, dtype)
    text = torch.cat([seeded(seed, "text", (1, TEXT_LENGTH, workload.context_size)) for seed in (8, 7)])
    text = text.to(device, dtype)
    tokens = seeded(9, "tokens", (2, IMAGE_TOKENS, workload.context_size)).to(device, dtype)
    mask = subjects(workload, scene)[0].masks[None].to(device, dtype)
    latents = seeded(1, "latents", (1, 4, *size)).to(device, dtype)
    _look_at_reference(generator, latents, text, mask)

    def after() -> None:
        found = mask_from_cross(unet.attn_processors)[1:]
        generator.set_self_mask("self", "ig", found)
        generator.set_self_mask("cross", mask=found.clone().detach())

    released = _step(
        unet, latents, torch.cat([text, tokens], dim=1), lambda: generator.toggle_enable_flag("all"), after
    )
    released()
    return {"released": released, "released_plain": _step(plain, latents, text, lambda: None, lambda: None)}


def _import(repo: Path) -> tuple[Any, Any]:
    sys.path.insert(0, str(repo))
    try:
        from model_lib.attention_processor import get_mask_from_cross
        from model_lib.moMA_generator import MoMA_generator
    except ImportError as error:
        raise MissingCodeError(
            f"--moma-repo {repo}: {error}. It must be a checkout of the released MoMA code, with diffusers importable."
        ) from error
    finally:
        sys.path.remove(str(repo))
    return MoMA_generator, get_mask_from_cross


def _unet(workload: Workload) -> Any:
    """diffusers' UNet; it shares the weights of ComfyUI's."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    weights = workload.model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(unet_config(workload.unet))
    with torch.device("meta"):
        unet = UNet2DConditionModel(attention_head_dim=8, **workload.unet)
    unet.load_state_dict({theirs: weights[ours] for theirs, ours in names.items() if ours in weights}, assign=True)
    return unet.requires_grad_(False)


def _load_adapter(unet: Any, workload: Workload, dtype: torch.dtype) -> None:
    """Our adapter's projections into the released processors, whose order is the adapter's."""
    for index, processor in enumerate(unet.attn_processors.values()):
        layer = workload.adapter.module.layer(index)
        processor.load_state_dict(layer.state_dict(), strict=False)
        if index % 2 == 0:
            processor.to(dtype)  # cross-attention ones stay in the fp16 that the released code casts to
            processor.scale_learnable.data.fill_(workload.adapter.scales[index // 2])
        processor.requires_grad_(False)


def _look_at_reference(generator: Any, latent: Tensor, text: Tensor, mask: Tensor) -> None:
    """The reference pass, then the flags and masks as before the released loop."""
    generator.set_selfAttn_strength(1.0)
    generator.toggle_enable_flag("self")
    generator.toggle_extract_inject_flag("self", "extract")
    with torch.no_grad(), _autocast(text):
        generator.unet(latent, timestep=torch.tensor([0], device=text.device), encoder_hidden_states=text[1:])
    generator.set_self_mask("eraseAll")
    generator.toggle_enable_flag("all")
    generator.toggle_extract_inject_flag("all", "masked_generation")
    generator.set_self_mask("self", "id", mask)
    generator.set_cross_subject_idxs(WORD_TOKENS)


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
