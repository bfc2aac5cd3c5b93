"""The MoMA adapter as a module in ComfyUI's memory management."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from .adapter_file import IMAGE_TOKENS, LAYER_COUNT, AdapterWeights, read_adapter
from .comfy_bridge.reference_cache import ReferenceCache
from .comfy_bridge.reference_encoding import EncodedReferences


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
    """All weights of an adapter file; sizes come from the file."""

    def __init__(self, weights: AdapterWeights, device: Any, dtype: Any, operations: Any) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype, "operations": operations}
        self.projector = Projector(weights.embedding_size, weights.context_size, **options)
        self.mapping = Mapping(weights.hidden_size, weights.embedding_size, **options)
        self.layers = nn.ModuleList(
            LayerProjections(
                weights.layer_size(i) if i % 2 == 0 else weights.context_size, weights.layer_size(i), **options
            )
            for i in range(LAYER_COUNT)
        )

    def layer(self, index: int) -> LayerProjections:
        """The projections of attention layer `index` (0..31)."""
        return cast(LayerProjections, self.layers[index])


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: what the nodes pass on as MOMA_ADAPTER.

    Attributes:
        patcher: Holds the `AdapterModule`; ComfyUI loads and offloads it.
        name: File name shown in messages.
        identity: Content hash, see `AdapterWeights.identity`.
        scales: `scale_learnable` per self-attention layer (16).
        layer_sizes: Channels per attention layer (32).
        reference_cache: Results of reference passes that went through this adapter.
        encoded_references: What they looked at.
    """

    patcher: comfy.model_patcher.ModelPatcher
    name: str
    identity: str
    scales: tuple[float, ...]
    layer_sizes: tuple[int, ...]
    embedding_size: int
    context_size: int
    hidden_size: int
    reference_cache: ReferenceCache = field(default_factory=ReferenceCache, compare=False)
    encoded_references: EncodedReferences = field(default_factory=EncodedReferences, compare=False)

    @property
    def module(self) -> AdapterModule:
        """The weights. Compute with them only while the patcher is loaded."""
        return self.patcher.model

    @property
    def device(self) -> torch.device:
        """Where its weights are brought to compute: not always the device of the MODEL that it is applied to."""
        return self.patcher.load_device

    def map_hidden_state(self, hidden: Tensor) -> Tensor:
        """MLLM hidden state [1, hidden] to subject embedding [1, embedding], both float32 on the CPU."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.module.mapping(hidden.to(self.device, torch.float32)).to("cpu", torch.float32)


def load_adapter(path: Path, dynamic: bool = True) -> Adapter:
    """Read an adapter file into ComfyUI's memory management.

    Args:
        dynamic: Whether it may be of the dynamic kind, where ComfyUI has that on.

    Raises:
        ValueError: The file is not a complete adapter, see `read_adapter`.
    """
    adapter = adapter_from_weights(read_adapter(path), path.name, dynamic)
    # When ComfyUI puts a MODEL on another device, it makes this model anew for that device as well.
    adapter.patcher.cached_patcher_init = (_patcher_from_file, (path,))
    return adapter


def _patcher_from_file(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_adapter(path, not disable_dynamic).patcher


def adapter_from_weights(weights: AdapterWeights, name: str, dynamic: bool = True) -> Adapter:
    """Put checked weights into a module that ComfyUI loads and offloads; stored dtypes are kept."""
    offload_device = comfy.model_management.unet_offload_device()
    # manual_cast computes in the dtype of its input, whatever each group was stored in.
    module = AdapterModule(weights, device="meta", dtype=None, operations=comfy.ops.manual_cast)
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
    patcher = kind(module, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device)
    module.load_state_dict(weights.tensors, assign=True)
    module.requires_grad_(False)
    return Adapter(
        patcher=patcher,
        name=name,
        identity=weights.identity,
        scales=weights.scales,
        layer_sizes=tuple(weights.layer_size(i) for i in range(LAYER_COUNT)),
        embedding_size=weights.embedding_size,
        context_size=weights.context_size,
        hidden_size=weights.hidden_size,
    )
