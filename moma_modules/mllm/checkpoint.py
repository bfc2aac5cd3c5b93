"""Reading and checking a LLaVA checkpoint: a folder as published, or one converted file.

A folder holds `config.json`, `tokenizer.model` and the weights as `.bin` or `.safetensors`, whole or in shards with an
index. A converted file (`convert.py`) is a `.safetensors` with all three in it. Needs torch, safetensors and
sentencepiece only.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from ..download.release import GET_AGAIN
from ..host.weight_files import read_header, read_json, read_pickle, read_safetensors
from .checkpoint_files import (
    FORMAT,
    FORMAT_VERSION,
    INDEXES,
    TOKENIZER,
    incomplete,
    indexed_files,
    missing_files,
    weight_files,
)
from .weights import (
    CONFIG,
    LanguageShape,
    VisionShape,
    check_weights,
    is_in_use,
    layers_in_use,
    read_language_shape,
    read_vision_shape,
    vision_layers,
)

TOKENIZER_KEY = "tokenizer"
"""The tensor of a converted file that holds the bytes of `tokenizer.model`."""


PARTS = {
    "vision": "model.vision_tower.vision_tower.vision_model.",
    "projector": "model.mm_projector.",
    "language": "model.",
}
"""The parts of a checkpoint, by the prefix of their weights in a published folder; the first that fits."""

_CONVERT = "Convert the model again with Convert MoMA MLLM."
_UNUSED = ("lm_head.weight",)
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".embeddings.position_ids")


Reader = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
"""Gives tensors and metadata of a weight file, or raises a ValueError that names it."""


@dataclass(frozen=True)
class Checkpoint:
    """A read and checked checkpoint.

    Attributes:
        config: The content of config.json.
        language: `embed_tokens.*`, `layers.*`, `norm.*`. A matrix of a layer may be int8 or float8_e4m3fn; then its
            float32 [rows] `*.weight_scale` is there too (`quantize.py`).
        vision: `embeddings.*`, `pre_layrnorm.*`, `encoder.layers.*`, only the layers in use.
        projector: `0.*`, `2.*`.
    """

    name: str
    config: dict[str, Any]
    language_shape: LanguageShape
    vision_shape: VisionShape
    language: dict[str, Tensor]
    vision: dict[str, Tensor]
    projector: dict[str, Tensor]
    tokenizer: SentencePieceProcessor


def read_mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one weight file, left in the file until they are looked at: a `Reader` without ComfyUI.

    Raises:
        ValueError: The file is unreadable, holds code, or is no file of named weights.
    """
    if path.suffix != ".safetensors":
        return read_named_weights(path, mapped=True), {}
    return read_safetensors(path, mapped=True), read_header(path).metadata


def read_named_weights(path: Path, mapped: bool) -> dict[str, Tensor]:
    """Weights from a file in PyTorch's own format.

    Raises:
        ValueError: See `read_mapped`.
    """
    content = read_pickle(path, GET_AGAIN, mapped)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold named weights. {GET_AGAIN}")
    return content


def read_checkpoint(path: Path, vision_heads: int | None = None, read: Reader = read_mapped) -> Checkpoint:
    """Read and check a folder or a converted file.

    Args:
        vision_heads: Attention heads of the vision tower; CLIP's rule, width / 64, where None.
        read: How weight files are read. Mapped, only what is looked at is read from the disk.

    Raises:
        ValueError: A file is missing, truncated or of another kind, or a weight is missing, not known, or of a wrong
            shape or dtype. The message names it.
    """
    config, tokenizer, weights = _read_converted(path, read) if path.is_file() else _read_folder(path, read)
    language_shape = read_language_shape(config, path)
    if tokenizer.vocab_size() > language_shape.vocabulary:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size()} tokens, the model {language_shape.vocabulary}: they "
            "do not belong together."
        )
    layers = vision_layers(weights, path)
    if path.is_dir():
        layers = layers_in_use(layers, config, path)
        weights = {key: value for key, value in weights.items() if is_in_use(key, layers)}
    vision_shape = read_vision_shape(weights, layers, vision_heads, path)
    check_weights(weights, language_shape, vision_shape, path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    return Checkpoint(path.name, config, language_shape, vision_shape, tokenizer=tokenizer, **parts)


def _read_folder(folder: Path, read: Reader) -> tuple[dict[str, Any], SentencePieceProcessor, dict[str, Tensor]]:
    missing = missing_files(folder, [CONFIG, TOKENIZER])
    if missing:
        raise ValueError(incomplete(folder, missing))
    config = read_json(folder / CONFIG, GET_AGAIN)
    path = folder / TOKENIZER
    tokenizer = _tokenizer(path.read_bytes(), path)
    tensors = {key: value for key, value in read_folder_weights(folder, read).items() if not _is_unused(key)}
    return config, tokenizer, {_canonical(key, folder): value for key, value in tensors.items()}


def _read_converted(path: Path, read: Reader) -> tuple[dict[str, Any], SentencePieceProcessor, dict[str, Tensor]]:
    tensors, metadata = read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a converted MoMA MLLM (format {metadata.get('format')!r}).")
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('version')!r}; this version of the pack reads {FORMAT_VERSION}. "
            "Update ComfyUI-MoMA, or convert the model again."
        )
    try:
        config = json.loads(metadata.get("config", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the config in its metadata is not readable JSON: {error}. {_CONVERT}") from error
    tokenizer = tensors.pop(TOKENIZER_KEY, None)
    if not isinstance(config, dict) or tokenizer is None or tokenizer.dtype != torch.uint8 or tokenizer.ndim != 1:
        raise ValueError(f"{path} lacks its config or the bytes of its tokenizer. {_CONVERT}")
    return config, _tokenizer(tokenizer.numpy().tobytes(), path), tensors


def _tokenizer(content: bytes, path: Path) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a readable sentencepiece model (truncated download?): {error}. {GET_AGAIN}"
        ) from error


def _is_unused(key: str) -> bool:
    return key in _UNUSED or key.endswith(_UNUSED_SUFFIXES)


def _canonical(key: str, folder: Path) -> str:
    for part, prefix in PARTS.items():
        if key.startswith(prefix):
            return f"{part}.{key[len(prefix) :]}"
    raise ValueError(f"{folder} is not a LLaVA-1.5 checkpoint: weight {key!r} is not known.")


def read_folder_weights(folder: Path, read: Reader) -> dict[str, Tensor]:
    """All weights of a checkpoint folder.

    Raises:
        ValueError: A file is missing, truncated, of another kind, holds code, or lacks what the index says of it.
    """
    names = weight_files(folder)
    missing = missing_files(folder, names)
    if missing:
        raise ValueError(incomplete(folder, missing))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read(folder / name)[0]
    for index in (folder / name for name in INDEXES):
        if index.is_file() and indexed_files(folder, index.name) == names:
            lost = sorted(set(read_json(index, GET_AGAIN)["weight_map"]) - set(tensors))
            if lost:
                raise ValueError(f"{index} lists the weight {lost[0]!r}, which none of its files holds. {GET_AGAIN}")
    return tensors
