"""The MLLM's structure: transformers' own LLaMA and CLIP, without memory until `loading` fills it.

transformers' models are imported when the first structure is built: that takes a second which ComfyUI's start, and all
work without the MLLM, can do without.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .seam import bring_strays, cache_argument
from .weights import LanguageShape, VisionShape

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlamaConfig

    from .key_values import KeyValues
    from .packed import Packed


class MllmModule(nn.Module):
    """Vision tower, projector and language model. A plain module: transformers' own has a read-only `device`."""

    def __init__(self, language: LanguageShape, vision: VisionShape) -> None:
        """Build the structure, of torch's own leaves and without memory."""
        from transformers import CLIPVisionModel, LlamaModel

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
        self.requires_grad_(False)

    def image_features(self, pixels: Tensor) -> Tensor:
        """[1, 3, S, S] to [1, patches, hidden]: patch features of the layer LLaVA selects, projected."""
        bring_strays(self, pixels.device, pixels.dtype)
        return self.projector(self.vision(pixels).last_hidden_state[:, 1:])

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [1, L] to embeddings [1, L, hidden]."""
        return self.language.embed_tokens(ids)

    def hidden_states(
        self, embeddings: Tensor, key_values: "KeyValues | None" = None, packed: "Packed | None" = None
    ) -> Tensor:
        """[1, L, hidden] to [1, L, hidden], after the final norm. Each token sees those before it.

        Args:
            key_values: What was before, and what is to be kept; needs `packed`.
            packed: Who sees whom instead, and at which positions.
        """
        bring_strays(self, embeddings.device, embeddings.dtype)
        given: dict[str, Any] = {"use_cache": False}
        if key_values is not None:
            given = {cache_argument(self.language): key_values, "use_cache": True}
        if packed is not None:
            mask = packed.mask(embeddings.dtype).to(embeddings.device)
            given |= {"attention_mask": mask, "position_ids": packed.positions().to(embeddings.device)}
        return self.language(inputs_embeds=embeddings, **given).last_hidden_state

    def layers(self) -> list[nn.Module]:
        """All transformer layers in the order they run, for progress."""
        return [*self.vision.encoder.layers, *self.language.layers]


def fill_constants(module: MllmModule, shape: LanguageShape) -> None:
    """Fill the buffers that no file holds: rotary frequencies (RoFormer, arXiv 2104.09864) and position numbers.

    Raises:
        RuntimeError: Something has no content yet.
    """
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


def _llama_config(shape: LanguageShape) -> "LlamaConfig":
    from transformers import LlamaConfig

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


def _clip_config(shape: VisionShape) -> "CLIPVisionConfig":
    from transformers import CLIPVisionConfig

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


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
