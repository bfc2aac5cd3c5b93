"""The released MoMA code, from a checkout of it, on diffusers' UNet with weights of ours.

It needs diffusers, which neither ComfyUI nor the pack has: put it into a folder of its own and that into PYTHONPATH,
as in `pip install --no-deps --target DIR diffusers importlib_metadata zipp`. The language model's part of the released
code (and so the llava package) is not imported.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .tiny_models import unet_config


class MissingCodeError(Exception):
    """The checkout or diffusers cannot be imported."""


@dataclass(frozen=True)
class ReleasedCode:
    """Its modules: of the generation, and of the attention's processors."""

    generation: ModuleType
    processors: ModuleType

    def generator(self, unet: Any, device: torch.device) -> Any:
        """A generator with its processors on this UNet; its own set-up would load a pipeline from the hub."""
        generator = self.generation.MoMA_generator.__new__(self.generation.MoMA_generator)
        generator.unet, generator.device = unet, device
        generator.set_ip_adapter()
        return generator

    def in_fp32(self) -> None:
        """From now on fp32 where its processors have fp16 hard-coded."""
        self.processors.torch = _Fp32()  # type: ignore[attr-defined]


class _Fp32:
    """Torch, but for what it calls fp16."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def import_released(repo: Path) -> ReleasedCode:
    """The modules of a checkout.

    Raises:
        MissingCodeError: See there.
    """
    sys.path.insert(0, str(repo))
    try:
        from model_lib import attention_processor, moMA_generator
    except ImportError as error:
        raise MissingCodeError(
            f"--moma-repo {repo}: {error}. It must be a checkout of the released MoMA code, with diffusers importable."
        ) from error
    finally:
        sys.path.remove(str(repo))
    return ReleasedCode(moMA_generator, attention_processor)


def diffusers_unet(unet: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """diffusers' UNet, which shares the weights of ComfyUI's.

    Args:
        unet: Channels per level and context size, as `unet_config` takes them.
        weights: By ComfyUI's names.
    """
    import comfy.utils
    from diffusers import UNet2DConditionModel

    names = comfy.utils.unet_to_diffusers(unet_config(dict(unet)))
    with torch.device("meta"):
        made = UNet2DConditionModel(attention_head_dim=8, **unet)
    made.load_state_dict({theirs: weights[ours] for theirs, ours in names.items() if ours in weights}, assign=True)
    return made.requires_grad_(False)


def look_at_reference(generator: Any, noisy: Tensor, text: Tensor, mask: Tensor, word_tokens: list[int]) -> None:
    """The reference pass, then the flags and masks as before the released loop.

    Args:
        noisy: The reference's latent with the noise of t = 0 [1, 4, h, w].
        text: Of the subject's word [1, T, C].
        mask: [1, 1, H, W] in 0..1.
        word_tokens: Where the subject is in the prompt.
    """
    generator.toggle_enable_flag("self")
    generator.toggle_extract_inject_flag("self", "extract")
    generator.unet(noisy, timestep=torch.tensor([0], device=text.device), encoder_hidden_states=text)
    generator.set_self_mask("eraseAll")
    generator.toggle_enable_flag("all")
    generator.toggle_extract_inject_flag("all", "masked_generation")
    generator.set_self_mask("self", "id", mask)
    generator.set_cross_subject_idxs([word_tokens])
