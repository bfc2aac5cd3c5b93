"""The reference pass: one forward over the reference picture gives keys and values for every self-attention layer."""

from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..adapter import Adapter
from .attention import plain_attention
from .settings import Shortcut, SubjectSettings
from .unet import BLOCKS

CUT_TEXT_TOKENS = 4
"""The released code drops the last 4 text embeddings in this pass, and the weights were trained with that."""

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Block index to keys and values [1, N, C] of the N reference tokens that lie on the subject."""


def reference_keys_values(
    model: Any, entry: SubjectSettings, shortcut: Shortcut, options: dict[str, Any], device: torch.device
) -> KeysValues:
    """Run the plain UNet once at timestep 0 over the reference, with the weights the run has (LoRA included).

    Args:
        model: The run's BaseModel, loaded.
        options: The run's transformer options; only the choice of attention function is taken from them.

    Returns:
        Blocks where no reference token lies on the subject are absent: these get no shortcut.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    collector = _Collector(entry.adapter, entry.subject.mask)
    sigma = model.model_sampling.sigmas[:1].to(device, torch.float32)
    latent = model.process_latent_in(shortcut.latent.to(device, torch.float32))
    run_options: dict[str, Any] = {
        "patches_replace": {"attn1": {place: _BlockCollector(collector, i) for i, place in enumerate(BLOCKS)}},
        "cond_or_uncond": [0],
        "sigmas": sigma,
    }
    if "optimized_attention_override" in options:
        run_options["optimized_attention_override"] = options["optimized_attention_override"]
    model.apply_model(
        latent + sigma * shortcut.noise.to(device, torch.float32),
        sigma,
        c_concat=_inpaint_channels(model, latent),
        c_crossattn=shortcut.text[:, :-CUT_TEXT_TOKENS].to(device),
        transformer_options=run_options,
    )
    return collector.found


def _inpaint_channels(model: Any, latent: Tensor) -> Tensor | None:
    """Inpaint checkpoints want a mask and a picture too: nothing is to be filled in, and the picture is there."""
    extra = model.diffusion_model.in_channels - latent.shape[1]
    if extra <= 0:
        return None
    return torch.cat([torch.zeros_like(latent[:, :1]), latent], dim=1)[:, :extra]


class _Collector:
    """Keys and values gathered during one reference pass."""

    def __init__(self, adapter: Adapter, mask: Tensor) -> None:
        self.adapter = adapter
        self.mask = mask.float()[None, None]
        self.found: KeysValues = {}

    def collect(self, block: int, k: Tensor, v: Tensor, size: tuple[int, int]) -> None:
        inside = interpolate(self.mask, size=size, mode="nearest").flatten() > 0
        places = inside.nonzero().flatten().to(k.device)
        if len(places):
            layer = self.adapter.module.layer(2 * block)
            self.found[block] = (layer.to_k_ip(k[:, places]), layer.to_v_ip(v[:, places]))


class _BlockCollector:
    """Self-attention replacement for one block during the reference pass."""

    def __init__(self, collector: _Collector, block: int) -> None:
        self.collector = collector
        self.block = block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        height, width = extra_options["activations_shape"][-2:]
        self.collector.collect(self.block, k, v, (height, width))
        return plain_attention(q, k, v, extra_options)
