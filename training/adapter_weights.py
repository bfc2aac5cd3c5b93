"""The adapter's weights in training: how they start, and how they are written in both published forms."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..moma_modules.adapter.file import RELEASED_REFERENCE_SIZE, AdapterWeights, convert_adapter
from ..moma_modules.adapter.networks import IMAGE_TOKENS, LAYER_COUNT, AdapterModule, AdapterSizes
from ..moma_modules.sampling.unet import attention_layers
from .loop import write_whole

GATES = "gates"
"""The name of the gates among `TrainableAdapter`'s parameters."""

_FIRST_GATE = 0.05
"""MoMA's start at 0. There, what lies behind them gets no gradient; a little lets all begin to learn at once."""


class TrainableAdapter(nn.Module):
    """The product's own module with `scale_learnable` of the self-attention layers as a parameter."""

    def __init__(self, start: AdapterWeights, with_mapping: bool = True) -> None:
        """Start from these weights, in float32.

        Args:
            with_mapping: Whether the mapping is trained too.
        """
        super().__init__()
        self.weights = AdapterModule(start.sizes, device=None, dtype=torch.float32, operations=nn)
        self.weights.load_state_dict(start.tensors)
        self.weights.mapping.requires_grad_(with_mapping)
        self.gates = nn.Parameter(torch.tensor(start.scales))

    def embedding(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] to subject embeddings [R, embedding]."""
        return self.weights.mapping(hidden)

    def image_tokens(self, embedding: Tensor) -> Tensor:
        """Keys and values of the image tokens of all layers side by side: [R, 4, X], as `ImageTokenLayers` has them."""
        tokens = self.weights.projector(embedding)
        layers = [self.weights.layer(i) for i in range(1, LAYER_COUNT, 2)]
        return torch.cat([part(tokens) for layer in layers for part in (layer.to_k_ip, layer.to_v_ip)], dim=2)


def first_weights(unet: Any, embedding_size: int, hidden_size: int) -> AdapterWeights:
    """Weights to start from: what the UNet itself does with keys and values.

    Cross-attention layers begin as copies of the UNet's `to_k` and `to_v` (as IP-Adapter's), self-attention layers as
    the identity, the mapping small (as MoMA's: xavier_normal / 4). Draws from torch's generator.
    """
    tensors: dict[str, Tensor] = {}
    context, layers = 0, []
    for i, (_, attention) in enumerate(attention_layers(unet)):
        for name in ("k", "v"):
            own = getattr(attention, f"to_{name}").weight.detach().float().cpu()
            tensors[f"layers.{i}.to_{name}_ip.weight"] = torch.eye(len(own)) if i % 2 == 0 else own.clone()
        context = attention.to_k.in_features
        layers.append(attention.to_k.out_features)
    linear = nn.Linear(embedding_size, IMAGE_TOKENS * context)
    tensors |= {"projector.proj.weight": linear.weight.detach(), "projector.proj.bias": linear.bias.detach()}
    tensors |= {"projector.norm.weight": torch.ones(context), "projector.norm.bias": torch.zeros(context)}
    for name, size in (("gate_proj", hidden_size), ("up_proj", hidden_size), ("down_proj", embedding_size)):
        weight = nn.init.xavier_normal_(torch.empty(embedding_size, size)) / 4
        tensors[f"mapping.{name}.weight"] = weight
    sizes = AdapterSizes(embedding_size, context, hidden_size, tuple(layers))
    gates = (_FIRST_GATE,) * (LAYER_COUNT // 2)
    return AdapterWeights(tensors, sizes, gates, RELEASED_REFERENCE_SIZE, identity="")


def save_adapter(state: dict[str, Tensor], folder: Path, reference_size: int, dtype: torch.dtype) -> Path:
    """Write `attn_adapters_projectors.th` and its `.safetensors` form into a folder.

    Args:
        state: Of a `TrainableAdapter`.
        reference_size: Side of the reference pictures that it was trained with, in pixels.

    Returns:
        The path of the `.safetensors` form.

    Raises:
        ValueError: A weight is not finite in this dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, Tensor]] = {"projectors": {}, "self_cross_attentions": {}, "llm_mapping": {}}
    for key, value in state.items():
        part, _, name = key.removeprefix("weights.").partition(".")
        tensor = value.detach().to("cpu", dtype).clone()
        if part == GATES:
            for i, gate in enumerate(tensor):
                groups["self_cross_attentions"][f"{2 * i}.scale_learnable"] = gate.reshape(1).clone()
        elif part == "mapping":
            groups["llm_mapping"][f"mapping.{name}"] = tensor
        else:
            groups["projectors" if part == "projector" else "self_cross_attentions"][name] = tensor
    size = torch.tensor([float(reference_size)])
    pickled = folder / "attn_adapters_projectors.th"
    write_whole(pickled, lambda path: torch.save({**groups, "reference_size": size}, path))
    target = pickled.with_suffix(".safetensors")
    convert_adapter(pickled, target)
    return target
