"""Finding and reading a LLaVA checkpoint folder in its original format. Needs torch and sentencepiece only.

Such a folder holds `config.json`, `pytorch_model.bin.index.json`, the shards it names, and `tokenizer.model`.
"""

import json
import math
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

CONFIG, INDEX, TOKENIZER = "config.json", "pytorch_model.bin.index.json", "tokenizer.model"
MAX_DEPTH = 4
"""How deep below a model folder checkpoints are looked for; enough for a hub snapshot."""

_VISION = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR = "model.mm_projector."
_LANGUAGE = "model."
_UNUSED = ("lm_head.weight",)
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class LanguageShape:
    """The LLaMA part, from config.json."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    norm_epsilon: float
    rope_theta: float


@dataclass(frozen=True)
class VisionShape:
    """The CLIP ViT part, from the shapes of its weights. `layers` are those in use, without the last one."""

    width: int
    intermediate_size: int
    layers: int
    heads: int
    patch_size: int
    image_size: int


@dataclass(frozen=True)
class Checkpoint:
    """A read folder. Tensors are memory-mapped where the files allow it.

    Attributes:
        language: `embed_tokens.*`, `layers.*`, `norm.*`.
        vision: `embeddings.*`, `pre_layrnorm.*`, `encoder.layers.*`, only the layers in use.
        projector: `0.*`, `2.*`.
    """

    name: str
    language_shape: LanguageShape
    vision_shape: VisionShape
    language: dict[str, Tensor]
    vision: dict[str, Tensor]
    projector: dict[str, Tensor]
    tokenizer: SentencePieceProcessor


def find_checkpoints(roots: Iterable[Path]) -> dict[str, Path]:
    """LLaVA folders at or below `roots`, by path relative to their root; the first root wins."""
    found: dict[str, Path] = {}
    for root in roots:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path = Path(folder)
            if CONFIG in files and _is_llava(path / CONFIG):
                found.setdefault(path.relative_to(root).as_posix() if path != root else root.name, path)
            if len(path.relative_to(root).parts) >= MAX_DEPTH:
                subfolders.clear()
    return found


def read_checkpoint(folder: Path, vision_heads: int | None = None) -> Checkpoint:
    """Read and check a folder.

    Args:
        vision_heads: Attention heads of the vision tower; CLIP's rule, width / 64, where None.

    Raises:
        ValueError: A file is missing, truncated or of another kind, or a weight is missing or not known.
    """
    config = _read_json(folder, CONFIG)
    tokenizer = _read_tokenizer(folder)
    language_shape = _language_shape(config, folder)
    tensors = _read_shards(folder)
    vision = {key[len(_VISION) :]: tensors.pop(key) for key in list(tensors) if key.startswith(_VISION)}
    projector = {key[len(_PROJECTOR) :]: tensors.pop(key) for key in list(tensors) if key.startswith(_PROJECTOR)}
    strangers = [key for key in tensors if not key.startswith(_LANGUAGE)]
    if strangers:
        raise ValueError(f"{folder} is not a LLaVA-1.5 checkpoint: weight {strangers[0]!r} is not known.")
    vision_shape = _vision_shape(vision, config, vision_heads, folder)
    if tokenizer.vocab_size() > language_shape.vocabulary:
        raise ValueError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size()} tokens, the model {language_shape.vocabulary}: they do "
            "not belong together."
        )
    return Checkpoint(
        name=folder.name,
        language_shape=language_shape,
        vision_shape=vision_shape,
        language={key[len(_LANGUAGE) :]: value for key, value in tensors.items()},
        vision={key: value for key, value in vision.items() if _in_use(key, vision_shape.layers)},
        projector=projector,
        tokenizer=tokenizer,
    )


def _is_llava(config: Path) -> bool:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "mm_projector_type" in content


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} is incomplete: {name} is missing. {_found(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON (truncated download?): {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def _read_tokenizer(folder: Path) -> SentencePieceProcessor:
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{folder} is incomplete: {TOKENIZER} is missing. {_found(folder)}")
    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a readable sentencepiece model (truncated download?): {error}") from error


def _language_shape(config: dict[str, Any], folder: Path) -> LanguageShape:
    path = folder / CONFIG
    if config.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(
            f"{path} is not that of a LLaVA-1.5 model: mm_projector_type is {config.get('mm_projector_type')!r}, "
            "expected 'mlp2x_gelu'."
        )
    if config.get("mm_use_im_start_end") or config.get("rope_scaling"):
        raise ValueError(f"{path} asks for mm_use_im_start_end or rope_scaling, which MoMA's model does not use.")
    try:
        return LanguageShape(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            key_value_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
            vocabulary=int(config["vocab_size"]),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-5)),
            rope_theta=float(config.get("rope_theta") or 10000.0),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the entry {error.args[0]!r}.") from error


def _vision_shape(vision: dict[str, Tensor], config: dict[str, Any], heads: int | None, folder: Path) -> VisionShape:
    """The published config does not describe the ViT, its weights do."""
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    missing = [key for key in (*needed, "encoder.layers.0.mlp.fc1.weight") if key not in vision]
    if missing:
        raise ValueError(f"{folder} is incomplete: weight {_VISION + missing[0]!r} is missing.")
    width, _, patch, _ = vision[needed[0]].shape
    positions = vision[needed[1]].shape[0] - 1
    total = 1 + max(int(key.split(".")[2]) for key in vision if key.startswith("encoder.layers."))
    select = int(config.get("mm_vision_select_layer", -2))
    layers = total + 1 + select
    if not (select < 0 < layers):
        raise ValueError(f"{folder / CONFIG}: mm_vision_select_layer is {select}, the vision tower has {total} layers.")
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(f"{folder / CONFIG}: mm_vision_select_feature must be 'patch'.")
    return VisionShape(
        width=width,
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        layers=layers,
        heads=heads or max(width // 64, 1),
        patch_size=patch,
        image_size=patch * math.isqrt(positions),
    )


def _in_use(vision_key: str, layers: int) -> bool:
    if vision_key.startswith("encoder.layers."):
        return int(vision_key.split(".")[2]) < layers
    return not vision_key.startswith("post_layernorm.")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    weight_map = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map (truncated download?).")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is incomplete: {', '.join(absent)} missing. {_found(folder)}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= _read_shard(folder / name)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise ValueError(f"{folder}: weight {lost[0]!r} is in {INDEX} but not in {weight_map[lost[0]]}.")
    return {key: value for key, value in tensors.items() if not _is_unused(key)}


def _is_unused(key: str) -> bool:
    return key in _UNUSED or key.endswith(_UNUSED_SUFFIXES)


def _read_shard(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # the older pickle format cannot be memory-mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it is truncated, not a PyTorch file, or holds code instead of weights ({error})."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is not a readable PyTorch file (truncated download?): {error}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold named weights.")
    return content


def _found(folder: Path) -> str:
    return f"Found: {', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}."
