"""Full-size models with seeded random weights: they load and run as the real files do, and their pictures are noise."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import ROOT
from .tiny_models import adapter_groups, seeded_weight, unet_config

VERSION = "1"
"""Raise it when the content of the checkpoint changes: cached ones are then made anew."""

SD15 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
EMBEDDING = 1024
HIDDEN = 128
TOKENIZER = ROOT / "tests" / "data" / "mllm" / "tiny56" / "checkpoint" / "tokenizer.model"

_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LlavaSize:
    """Sizes of a LLaVA checkpoint; `vocabulary` None: as many tokens as the tokenizer knows."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_width: int
    vision_intermediate: int
    vision_layers: int
    image: int
    vocabulary: int | None = None

    def with_layers(self, layers: int) -> "LlavaSize":
        """The same with another number of language layers."""
        return replace(self, layers=layers)


SMALL_LLAVA = LlavaSize(
    hidden=HIDDEN,
    intermediate=2 * HIDDEN,
    layers=4,
    heads=4,
    vision_width=128,
    vision_intermediate=256,
    vision_layers=4,
    image=112,
)
FULL_LLAVA = LlavaSize(
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    vision_width=1024,
    vision_intermediate=4096,
    vision_layers=24,
    image=336,
    vocabulary=32000,
)
"""LLaVA-1.5 7B, as released."""


def sd15_checkpoint(cache: Path) -> Path:
    """A whole SD1.5 checkpoint (UNet, CLIP, VAE; original key names, fp16, 2 GB) in `cache`, made once.

    ComfyUI must be importable.
    """
    path = cache / f"sd15-random-{VERSION}.safetensors"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        for outdated in cache.glob("sd15-random-*.safetensors"):
            outdated.unlink()
        weights = {key: seeded_weight(0, key, shape).half() for key, shape in _checkpoint_shapes().items()}
        _written(path, lambda partial: save_file(weights, partial))
    return path


def llava_folder(target: Path, size: LlavaSize = SMALL_LLAVA) -> Path:
    """A complete MLLM folder as LLaVA publishes it; the same bytes of weights every time."""
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = size.vocabulary or _vocabulary()
    shutil.copyfile(TOKENIZER, target / "tokenizer.model")
    weights = {key: seeded_weight(4, key, shape).half() for key, shape in _llava_shapes(size, vocabulary).items()}
    keys = list(weights)
    weight_map = {}
    for number, part in ((1, keys[: len(keys) // 2]), (2, keys[len(keys) // 2 :])):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: weights[key] for key in part}, target / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(value.numel() * value.element_size() for value in weights.values())
    contents = {
        "config.json": _llava_config(size, vocabulary),
        "pytorch_model.bin.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
    for name, content in contents.items():
        (target / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return target


def adapter_file(target: Path) -> Path:
    """`attn_adapters_projectors.th` in the folder `target`: full size for SD1.5, its mapping fits `llava_folder`."""
    target.mkdir(parents=True, exist_ok=True)
    groups = adapter_groups(SD15, embedding=EMBEDDING, hidden=HIDDEN)
    halves = {name: {key: value.half() for key, value in group.items()} for name, group in groups.items()}
    path = target / "attn_adapters_projectors.th"
    _written(path, lambda partial: torch.save(halves, partial))
    return path


def _written(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that appears only once it is complete."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
    os.close(handle)
    try:
        write(Path(partial))
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _checkpoint_shapes() -> Shapes:
    """Names and shapes of a checkpoint, from ComfyUI's own modules."""
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.cuda.is_available()
    import comfy.ops
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.sd1_clip import SDClipModel

    with torch.device("meta"):
        parts: dict[str, torch.nn.Module] = {
            "model.diffusion_model.": UNetModel(**unet_config(SD15), operations=comfy.ops.disable_weight_init),
            "first_stage_model.": AutoencoderKL(ddconfig=_VAE, embed_dim=4),
            "cond_stage_model.": SDClipModel(),
        }
    kept = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.")
    shapes = {prefix + key: tuple(v.shape) for prefix, part in parts.items() for key, v in part.state_dict().items()}
    return {key: shape for key, shape in shapes.items() if key.startswith(kept)}


def _vocabulary() -> int:
    """How many tokens the tokenizer knows."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=TOKENIZER.read_bytes()).vocab_size()


def _llava_config(size: LlavaSize, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "mm_hidden_size": size.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_aspect_ratio": "pad",
        "torch_dtype": "float16",
    }


def _llava_shapes(size: LlavaSize, vocabulary: int) -> Shapes:
    hidden, inner = size.hidden, size.intermediate
    language = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(size.layers):
        language |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        language |= {f"model.layers.{i}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        language[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, inner)
        language |= {f"model.layers.{i}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    first = _linear("model.mm_projector.0", size.vision_width, hidden)
    projector = first | _linear("model.mm_projector.2", hidden, hidden)
    return {**language, **_vision_shapes(size), **projector, "lm_head.weight": (vocabulary, hidden)}


def _vision_shapes(size: LlavaSize) -> Shapes:
    prefix, width, patch = "model.vision_tower.vision_tower.vision_model.", size.vision_width, 14
    shapes: Shapes = {
        f"{prefix}embeddings.class_embedding": (width,),
        f"{prefix}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{prefix}embeddings.position_embedding.weight": ((size.image // patch) ** 2 + 1, width),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    for i in range(size.vision_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", width, size.vision_intermediate)
        shapes |= _linear(f"{layer}mlp.fc2", size.vision_intermediate, width)
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
