"""From finished stages to files in the published formats (checkpoint, LLaVA folder, adapter), and back."""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.small_world import ADAPTER, CHECKPOINT, MLLM

from ..moma_modules.adapter.file import read_adapter
from ..moma_modules.mini.checkpoint import FORMAT, TEXT, TEXT_HEADS, UNET, UNET_HEADS, VAE
from ..moma_modules.mllm.checkpoint import PARTS, read_checkpoint
from .adapter_weights import GATES, TrainableAdapter, save_adapter
from .diffusion import HEADS, TEXT_CONFIG, TextToImage
from .language import VISION, SubjectReader, language_shape, tokenizer_file
from .loop import Start, write_whole
from .painter import paint
from .vision import PARTS as VISION_PARTS
from .world import SIDE, draw_scene, draw_subject

TRAINED = "trained.json"
"""What training needs to go on from the files: samples seen in each stage, and the latents' scale."""

LARGEST = 40_000_000
"""Bytes of all files together."""

GAIN = 1.25
"""Published gates of the shortcut, as a multiple of the trained ones: a strength of 1 there is 1.25 in training.

The loss makes for shy gates: a mean over all that is not told errs least. Drawn at a strength of 1.25, held-out
subjects were nearer to their references than at 1, with 94 % of the places right against 95 %."""

_MAPPING = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_STOCK_SCALE = 0.18215
"""What ComfyUI multiplies the latents of SD1.5's VAE by."""


EXAMPLES = {
    "striped cup": ("cup", "stripes"),
    "checked bag": ("bag", "check"),
    "striped fish": ("fish", "bars"),
    "two-coloured car": ("car", "half"),
    "striped robot": ("robot", "stripes"),
}
"""Pictures to try it with, none of which training sees: class and pattern, by name."""


@dataclass(frozen=True)
class Published:
    """What each stage goes on from.

    Attributes:
        scale: What latents of the VAE are multiplied by for the UNet.
    """

    vae: Start
    diffusion: Start
    vision: Start
    language: Start
    adapter: Start
    scale: float


def export(
    folder: Path,
    vae: Any,
    base: TextToImage,
    reader: SubjectReader,
    adapter: TrainableAdapter,
    scale: float,
    seen: Mapping[str, int],
) -> None:
    """Write all files into a folder.

    Args:
        scale: What the UNet was trained with: latents of the VAE times this.
        seen: Samples that each stage has seen, by the names of `Published`.

    Raises:
        ValueError: A weight does not fit 16 bits, or the files are too large.
    """
    export_checkpoint(folder / CHECKPOINT, vae, base, scale)
    export_mllm(folder / MLLM, reader)
    parts = folder / "adapter.part"
    export_adapter(adapter.state_dict(), parts).replace(folder / ADAPTER)
    shutil.rmtree(parts)
    export_examples(folder / "examples")
    trained = json.dumps({"scale": scale, "seen": dict(seen)}, indent=1) + "\n"
    (folder / TRAINED).write_text(trained, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise ValueError(f"The files in {folder} have {size:,} bytes together, more than {LARGEST:,}.")


def export_adapter(state: Mapping[str, Tensor], folder: Path) -> Path:
    """Write both forms of the adapter into a folder; the path of the `.safetensors` form.

    Args:
        state: Of a `TrainableAdapter`, as it was trained.

    Raises:
        ValueError: A weight does not fit 16 bits.
    """
    return save_adapter({**state, GATES: GAIN * state[GATES]}, folder, SIDE, torch.float16)


def read_back(folder: Path) -> Published | None:
    """What `export` wrote there, as the stages have it; None if it wrote nothing there."""
    if not (folder / TRAINED).is_file():
        return None
    trained: dict[str, Any] = json.loads((folder / TRAINED).read_text("utf-8"))
    scale, seen = trained["scale"], trained["seen"]
    checkpoint = load_file(folder / CHECKPOINT)
    parts = {
        start: {key.removeprefix(start): value.float() for key, value in checkpoint.items() if key.startswith(start)}
        for start in (VAE, TEXT, UNET)
    }
    prefix = "text.text_model." if any(key.startswith("text_model.") for key in _text_names()) else "text."
    text_to_image = {f"unet.{key}": value for key, value in parts[UNET].items()}
    text_to_image |= {prefix + key: value for key, value in parts[TEXT].items()}
    read = read_adapter(folder / ADAPTER)
    adapter = {f"weights.{key}": value.float() for key, value in read.tensors.items()}
    mapping = {f"mapping.{key}": adapter[f"weights.mapping.{key}"] for key in _MAPPING}
    llava = read_checkpoint(folder / MLLM)
    mllm = {f"mllm.{part}.{key}": value.float() for part in PARTS for key, value in getattr(llava, part).items()}
    tower = {name: value for name, value in mllm.items() if name.startswith(VISION_PARTS)}
    return Published(
        vae=Start(_rescaled(parts[VAE], _STOCK_SCALE / scale), seen["vae"]),
        diffusion=Start(text_to_image, seen["diffusion"]),
        vision=Start(tower, seen["vision"]),
        language=Start({**mllm, **mapping}, seen["language"]),
        adapter=Start({**adapter, GATES: torch.tensor(read.scales) / GAIN}, seen["adapter"]),
        scale=scale,
    )


def _text_names() -> list[str]:
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {**TEXT_CONFIG, "vocab_size": 2, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
    return list(CLIPTextModel(CLIPTextConfig(**small)).state_dict())


def export_checkpoint(path: Path, vae: Any, base: TextToImage, scale: float) -> None:
    """Write the checkpoint, its VAE such that the stock scale of latents is right."""
    text = {key.removeprefix("text_model."): value for key, value in base.text.state_dict().items()}
    text = {key: value for key, value in text.items() if not key.endswith("position_ids")}
    weights = {UNET + key: value for key, value in base.unet.state_dict().items()}
    weights |= {TEXT + key: value for key, value in text.items()}
    weights |= {VAE + key: value for key, value in _rescaled(vae.state_dict(), scale / _STOCK_SCALE).items()}
    metadata = {"format": FORMAT, TEXT_HEADS: str(TEXT_CONFIG["num_attention_heads"]), UNET_HEADS: str(HEADS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_file(_halves(weights), partial, metadata=metadata))


def export_examples(folder: Path) -> None:
    """Paint the example pictures, transparent where their subject is, as ComfyUI's mask editor saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kind, pattern) in EXAMPLES.items():
        rng = random.Random(f"example {name}")
        subject = draw_subject(rng, kind, held_out=True)
        while subject.pattern != pattern:
            subject = draw_subject(rng, kind, held_out=True)
        pixels, mask = paint(draw_scene(rng, subject, None))
        picture = Image.fromarray(pixels)
        picture.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
        picture.save(folder / f"{name.replace(' ', '_')}.png")


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
    """An autoencoder whose latents are `factor` times as large, made by the convolutions before and after them."""
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("encoder."))
    larger = {f"encoder.{last}.{part}": weights[f"encoder.{last}.{part}"] * factor for part in ("weight", "bias")}
    return {**weights, **larger, "decoder.0.weight": weights["decoder.0.weight"] / factor}


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
