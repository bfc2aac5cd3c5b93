"""Where transformers' modules meet ComfyUI's leaves.

One rule holds here: what meets an activation has its device and its dtype. ComfyUI's Linear, Conv2d and LayerNorm bring
their weights to their input; a table of rows has no input to go by and is told the dtype; what is no leaf of ComfyUI's
(norm weights, the class embedding, constants) is brought before each forward.
"""

import inspect
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from .leaves import CastLinear


class CastEmbedding(comfy.ops.manual_cast.Embedding):
    """A table in any floating-point dtype, whose rows come out in `compute_dtype`."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] to rows [..., width]."""
        return super().forward(ids, out_dtype=self.compute_dtype)


def use_comfy_leaves(module: nn.Module, dtype: torch.dtype, linear: Callable[[str], type[CastLinear]]) -> None:
    """Replace torch's leaves by ComfyUI's of the same size, without memory.

    Args:
        dtype: What the module will compute in.
        linear: What a Linear becomes, by the name of its weight.
    """
    for parent_name, parent in list(module.named_modules()):
        for name, leaf in list(parent.named_children()):
            replacement = _comfy_leaf(leaf, dtype, linear(f"{parent_name}.{name}.weight"))
            if replacement is not None:
                setattr(parent, name, replacement)


def bring_strays(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Bring what is no leaf of ComfyUI's to where an activation comes.

    Constants keep their dtype: position numbers are integers, and rotary angles are computed in float32 and cast by
    transformers where they meet queries and keys.
    """
    for owner in module.modules():
        if hasattr(owner, "comfy_cast_weights"):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device != device or parameter.dtype != dtype:
                setattr(owner, name, nn.Parameter(parameter.to(device, dtype), requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def cache_argument(language: nn.Module) -> str:
    """What `LlamaModel.forward` calls the keys and values of what was before; transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(language.forward).parameters else "past_key_values"


def _comfy_leaf(leaf: nn.Module, dtype: torch.dtype, linear: type[CastLinear]) -> nn.Module | None:
    """ComfyUI's leaf for a plain torch one; None where ComfyUI has none."""
    make = _LEAVES.get(type(leaf))
    return make(leaf, dtype, linear) if make else None


def _embedding(leaf: nn.Embedding, dtype: torch.dtype, _: type[CastLinear]) -> CastEmbedding:
    table = CastEmbedding(leaf.num_embeddings, leaf.embedding_dim, device="meta")
    table.compute_dtype = dtype
    return table


_LEAVES: dict[type[nn.Module], Callable[[Any, torch.dtype, type[CastLinear]], nn.Module]] = {
    nn.Linear: lambda leaf, _, linear: linear(
        leaf.in_features, leaf.out_features, bias=leaf.bias is not None, device="meta"
    ),
    nn.Embedding: _embedding,
    nn.LayerNorm: lambda leaf, *_: comfy.ops.manual_cast.LayerNorm(leaf.normalized_shape, eps=leaf.eps, device="meta"),
    nn.Conv2d: lambda leaf, *_: comfy.ops.manual_cast.Conv2d(
        leaf.in_channels, leaf.out_channels, leaf.kernel_size, leaf.stride, bias=leaf.bias is not None, device="meta"
    ),
}
