"""A plain image adapter for scale: what IPAdapter's nodes add to a model, without masks and options.

Decoupled cross-attention (IP-Adapter, arXiv 2308.06721): every cross-attention layer also attends to a few image
tokens, whose keys and values are projected anew in every forward.
"""

from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor
from torch.nn import Linear

IMAGE_TOKENS = 4


class ImageAttention:
    """Replacement for one cross-attention layer."""

    def __init__(self, to_k: Linear, to_v: Linear, tokens: Tensor) -> None:
        """Take the projections, and the image tokens [2, 4, context] of positive and negative prompt."""
        self.to_k, self.to_v, self.tokens = to_k, to_v, tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q [R, T, C], k and v [R, L, C] to [R, T, C]."""
        heads = extra_options["n_heads"]
        order = extra_options["cond_or_uncond"]
        tokens = self.tokens[order].repeat_interleave(q.shape[0] // len(order), dim=0).to(q.dtype)
        added = optimized_attention(q, self.to_k(tokens), self.to_v(tokens), heads)
        return optimized_attention(q, k, v, heads) + added


def image_adapter_model(model: Any, layer_sizes: tuple[int, ...], context: int, dtype: torch.dtype) -> Any:
    """A clone of `model` with random image attention.

    Args:
        layer_sizes: Channels of the 32 attention layers.
        context: Size of a text token.
    """
    from comfyui_moma.moma_modules.sampling.unet import BLOCKS

    device = model.load_device
    clone = model.clone()
    tokens = torch.randn(2, IMAGE_TOKENS, context, device=device, dtype=dtype)
    for block, (name, number) in enumerate(BLOCKS):
        channels = layer_sizes[2 * block + 1]
        to_k, to_v = (Linear(context, channels, bias=False, device=device, dtype=dtype) for _ in range(2))
        clone.set_model_attn2_replace(ImageAttention(to_k, to_v, tokens), name, number)
    return clone
