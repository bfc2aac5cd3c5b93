"""From finished stages to files in the published formats: checkpoint, LLaVA folder, adapter."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..moma_modules.mini.checkpoint import FORMAT, TEXT, TEXT_HEADS, UNET, VAE
from ..moma_modules.mllm.checkpoint import PARTS
from .adapter_weights import TrainableAdapter, save_adapter
from .diffusion import TEXT_CONFIG, TextToImage
from .language import VISION, SubjectReader, language_shape, tokenizer_file
from .loop import write_whole
from .world import SIDE

CHECKPOINT, MLLM, ADAPTER = "moma_mini.safetensors", "moma_mini_llava", "moma_mini_adapter.safetensors"
LARGEST = 40_000_000
"""Bytes of all files together."""

_STOCK_SCALE = 0.18215
"""What ComfyUI multiplies the latents of SD1.5's VAE by."""


def export(
    folder: Path, vae: Any, base: TextToImage, reader: SubjectReader, adapter: TrainableAdapter, scale: float
) -> None:
    """Write all files into a folder.

    Args:
        scale: What the UNet was trained with: latents of the VAE times this.

    Raises:
        ValueError: A weight does not fit 16 bits, or the files are too large.
    """
    export_checkpoint(folder / CHECKPOINT, vae, base, scale)
    export_mllm(folder / MLLM, reader)
    parts = folder / "adapter.part"
    save_adapter(adapter.state_dict(), parts, SIDE, torch.float16).replace(folder / ADAPTER)
    shutil.rmtree(parts)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise ValueError(f"The files in {folder} have {size:,} bytes together, more than {LARGEST:,}.")


def export_checkpoint(path: Path, vae: Any, base: TextToImage, scale: float) -> None:
    """Write the checkpoint, its VAE such that the stock scale of latents is right."""
    text = {key.removeprefix("text_model."): value for key, value in base.text.state_dict().items()}
    text = {key: value for key, value in text.items() if not key.endswith("position_ids")}
    weights = {UNET + key: value for key, value in base.unet.state_dict().items()}
    weights |= {TEXT + key: value for key, value in text.items()}
    weights |= {VAE + key: value for key, value in _rescaled(vae.state_dict(), scale / _STOCK_SCALE).items()}
    metadata = {"format": FORMAT, TEXT_HEADS: str(TEXT_CONFIG["num_attention_heads"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_file(_halves(weights), partial, metadata=metadata))


def export_mllm(folder: Path, reader: SubjectReader) -> None:
    """Write the language model as LLaVA's folders are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_file())
    (folder / "config.json").write_text(json.dumps(_llava_config(), indent=1), encoding="utf-8")
    weights: dict[str, Tensor] = {}
    for part, prefix in PARTS.items():
        weights |= {prefix + key: value for key, value in getattr(reader.mllm, part).state_dict().items()}
    weights = {key: value for key, value in weights.items() if not key.endswith(("position_ids", "inv_freq"))}
    halves = _halves(weights)
    write_whole(folder / "model.safetensors", lambda partial: save_file(halves, partial, metadata={"format": "pt"}))


def _rescaled(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A VAE whose latents are `factor` times as large, made by its last and its first convolution."""
    rescaled = dict(weights)
    channels = len(weights["quant_conv.weight"]) // 2
    for name in ("quant_conv.weight", "quant_conv.bias"):
        rescaled[name] = weights[name].clone()
        rescaled[name][:channels] *= factor
    rescaled["quant_conv.bias"][channels:] += 2 * torch.tensor(factor).log()
    rescaled["post_quant_conv.weight"] = weights["post_quant_conv.weight"] / factor
    return rescaled


def _halves(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    halves = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in weights.items()}
    broken = [key for key, value in halves.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"Weight {broken[0]!r} holds values that are not finite in 16 bits.")
    return halves


def _llava_config() -> dict[str, Any]:
    shape = language_shape()
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "mm_hidden_size": VISION.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,  # The layers that LLaVA leaves unused at the end were never made.
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "torch_dtype": "float16",
    }
