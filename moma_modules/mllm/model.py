"""The MLLM as a module in ComfyUI's memory management.

The architectures are transformers' own LLaMA and CLIP; their leaves are replaced with ComfyUI's, which cast and move
weights as they compute. Weights stay in the dtype and, where possible, the memory-mapped pages of the files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from .checkpoint import Checkpoint, LanguageShape, VisionShape, read_checkpoint

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
"""What the model computes in."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class MllmModule(nn.Module):
    """Vision tower, projector and language model. A plain module: transformers' own has a read-only `device`."""

    def __init__(self, language: LanguageShape, vision: VisionShape) -> None:
        """Build the structure without memory; weights are assigned afterwards."""
        super().__init__()
        with torch.device("meta"):
            self.language = LlamaModel(_llama_config(language))
            tower = CLIPVisionModel(_clip_config(vision))
            self.vision = getattr(tower, "vision_model", tower)  # transformers 5 dropped the inner module
            self.projector = nn.Sequential(
                nn.Linear(vision.width, language.hidden_size),
                nn.GELU(),
                nn.Linear(language.hidden_size, language.hidden_size),
            )
        self.vision.post_layernorm = nn.Identity()  # belongs to the pooled output, which LLaVA does not use
        _use_comfy_leaves(self)

    def image_features(self, pixels: Tensor) -> Tensor:
        """[1, 3, S, S] to [1, patches, hidden]: patch features of the layer LLaVA selects, projected."""
        self._bring_strays(pixels.device)
        return self.projector(self.vision(pixels).last_hidden_state[:, 1:])

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [1, L] to embeddings [1, L, hidden], in the dtype of the weights."""
        return self.language.embed_tokens(ids)

    def last_hidden_state(self, embeddings: Tensor) -> Tensor:
        """[1, L, hidden] to [1, hidden]: the last token after the final norm."""
        self._bring_strays(embeddings.device)
        return self.language(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]

    def layers(self) -> list[nn.Module]:
        """All transformer layers in the order they run, for progress."""
        return [*self.vision.encoder.layers, *self.language.layers]

    def _bring_strays(self, device: torch.device) -> None:
        """Norm weights, the class embedding and constant buffers are no leaves of ComfyUI's: they follow the input."""
        for module in self.modules():
            if not hasattr(module, "comfy_cast_weights"):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.device != device:
                        tensor.data = tensor.data.to(device)


@dataclass(frozen=True)
class Mllm:
    """A loaded MLLM: what the nodes pass on as MOMA_MLLM.

    Attributes:
        patcher: Holds the `MllmModule`; ComfyUI loads and offloads it.
        name: Folder name shown in messages.
        compute_dtype: What the forward pass computes in.
        hidden_size: Size of a hidden state (4096 in the released checkpoint).
        image_size: Side of the vision tower's input (336).
    """

    patcher: comfy.model_patcher.ModelPatcher
    tokenizer: SentencePieceProcessor
    name: str
    compute_dtype: torch.dtype
    hidden_size: int
    image_size: int

    @property
    def module(self) -> MllmModule:
        """The weights. Compute with them only while the patcher is loaded."""
        return self.patcher.model


def load_mllm(folder: Path, precision: str = "auto", vision_heads: int | None = None) -> Mllm:
    """Read a LLaVA folder into ComfyUI's memory management.

    Args:
        precision: One of `PRECISIONS`.
        vision_heads: See `read_checkpoint`.

    Raises:
        ValueError: See `read_checkpoint`; also a weight of a wrong shape.
    """
    checkpoint = read_checkpoint(folder, vision_heads)
    device = comfy.model_management.text_encoder_device()
    compute_dtype = _DTYPES.get(precision) or _fast_dtype(device)
    module = MllmModule(checkpoint.language_shape, checkpoint.vision_shape)
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
    )
    _assign(module, checkpoint, compute_dtype)
    return Mllm(
        patcher=patcher,
        tokenizer=checkpoint.tokenizer,
        name=checkpoint.name,
        compute_dtype=compute_dtype,
        hidden_size=checkpoint.language_shape.hidden_size,
        image_size=checkpoint.vision_shape.image_size,
    )


def _fast_dtype(device: torch.device) -> torch.dtype:
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def _llama_config(shape: LanguageShape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        rms_norm_eps=shape.norm_epsilon,
        max_position_embeddings=4096,
        hidden_act="silu",
    )


def _clip_config(shape: VisionShape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )


def _use_comfy_leaves(module: nn.Module) -> None:
    """Replace plain torch leaves by ComfyUI's of the same size."""
    for parent in list(module.modules()):
        for name, leaf in list(parent.named_children()):
            make = _COMFY_LEAVES.get(type(leaf))
            if make is not None:
                setattr(parent, name, make(leaf))


_COMFY_LEAVES: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: lambda leaf: comfy.ops.manual_cast.Linear(
        leaf.in_features, leaf.out_features, bias=leaf.bias is not None, device="meta"
    ),
    nn.Embedding: lambda leaf: comfy.ops.manual_cast.Embedding(leaf.num_embeddings, leaf.embedding_dim, device="meta"),
    nn.LayerNorm: lambda leaf: comfy.ops.manual_cast.LayerNorm(leaf.normalized_shape, eps=leaf.eps, device="meta"),
    nn.Conv2d: lambda leaf: comfy.ops.manual_cast.Conv2d(
        leaf.in_channels, leaf.out_channels, leaf.kernel_size, leaf.stride, bias=leaf.bias is not None, device="meta"
    ),
}


def _assign(module: MllmModule, checkpoint: Checkpoint, compute_dtype: torch.dtype) -> None:
    """Give the module its weights in one go; loading shard by shard would allocate the absent ones."""
    weights = dict(_prefixed(checkpoint))
    expected = module.state_dict()
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ValueError(f"MLLM {checkpoint.name} is incomplete: weight {missing[0]!r} is missing.")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ValueError(f"MLLM {checkpoint.name}: weight {unknown[0]!r} has no place in a LLaVA-1.5 model.")
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point():
            raise ValueError(
                f"MLLM {checkpoint.name}: weight {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected a "
                f"floating-point one of shape {tuple(expected[key].shape)}."
            )
    follows = _linear_keys(module)
    weights = {key: value if key in follows else value.to(compute_dtype) for key, value in weights.items()}
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False)
    _fill_constants(module, checkpoint.language_shape)


def _prefixed(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in ("language", "vision", "projector"):
        for key, value in getattr(checkpoint, name).items():
            yield f"{name}.{key}", value


def _linear_keys(module: nn.Module) -> set[str]:
    """Weights that ComfyUI casts at each use, and that hence keep the file's dtype: all but a few thousand values."""
    kinds = (nn.Linear, nn.Embedding)
    return {
        f"{name}.{key}"
        for name, leaf in module.named_modules()
        if isinstance(leaf, kinds)
        for key, _ in leaf.named_parameters(recurse=False)
    }


def _fill_constants(module: MllmModule, shape: LanguageShape) -> None:
    """Buffers that no file holds: rotary frequencies (RoFormer, arXiv 2104.09864) and position numbers."""
    head = shape.hidden_size // shape.heads
    frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, head, 2).float() / head)
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if name in ("inv_freq", "original_inv_freq"):
                setattr(owner, name, frequencies.clone())
            elif name == "position_ids":
                setattr(owner, name, torch.arange(buffer.shape[-1])[None])
    left = [name for name, tensor in _tensors(module) if tensor.is_meta]
    if left:
        raise RuntimeError(f"This version of transformers has a constant that the pack does not know: {left[0]}.")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
