"""The networks of the adapter, made of leaves that are given: torch's own (`torch.nn`) or ComfyUI's operations."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

LAYER_COUNT = 32
"""Attention layers of an SD1.5 UNet: 16 blocks with one self- and one cross-attention each."""

IMAGE_TOKENS = 4


@dataclass(frozen=True)
class AdapterSizes:
    """Widths of the adapter's networks.

    Attributes:
        embedding: Of the subject embedding (1024 in the released adapter).
        context: Of a text token's embedding (768 for SD1.5).
        hidden: Of the MLLM's hidden state that the mapping takes (4096 in the released adapter).
        layers: Channels of the 32 attention layers.
    """

    embedding: int
    context: int
    hidden: int
    layers: tuple[int, ...]


class Projector(nn.Module):
    """Subject embedding to image tokens: `LayerNorm(Linear(e).reshape(4, context))`."""

    def __init__(self, embedding_size: int, context_size: int, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(embedding_size, IMAGE_TOKENS * context_size, device=device, dtype=dtype)
        self.norm = operations.LayerNorm(context_size, device=device, dtype=dtype)

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, embedding] to [B, 4, context]."""
        tokens = self.proj(embedding)
        return self.norm(tokens.reshape(embedding.shape[0], IMAGE_TOKENS, -1))


class Mapping(nn.Module):
    """MLLM hidden state to subject embedding: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, embedding_size: int, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        options = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = operations.Linear(hidden_size, embedding_size, **options)
        self.up_proj = operations.Linear(hidden_size, embedding_size, **options)
        self.down_proj = operations.Linear(embedding_size, embedding_size, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, hidden] to [B, embedding]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class LayerProjections(nn.Module):
    """The key and value projections that MoMA adds to one attention layer."""

    def __init__(self, in_size: int, channels: int, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        self.to_k_ip = operations.Linear(in_size, channels, bias=False, device=device, dtype=dtype)
        self.to_v_ip = operations.Linear(in_size, channels, bias=False, device=device, dtype=dtype)


class AdapterModule(nn.Module):
    """All weights of an adapter."""

    def __init__(self, sizes: AdapterSizes, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype, "operations": operations}
        self.projector = Projector(sizes.embedding, sizes.context, **options)
        self.mapping = Mapping(sizes.hidden, sizes.embedding, **options)
        self.layers = nn.ModuleList(
            LayerProjections(channels if i % 2 == 0 else sizes.context, channels, **options)
            for i, channels in enumerate(sizes.layers)
        )

    def layer(self, index: int) -> LayerProjections:
        """The projections of attention layer `index` (0..31)."""
        return cast(LayerProjections, self.layers[index])
