"""Finding, reading and checking a LLaVA checkpoint: a folder as published, or one converted file.

A folder holds `config.json`, `tokenizer.model` and the weights as `.bin` or `.safetensors`, whole or in shards with an
index. A converted file (`convert.py`) is a `.safetensors` with all three in it. Needs torch, safetensors and
sentencepiece only.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from ..file_kinds import LLAVA, MLLM, MLLM_FORMAT, kind_of
from ..release import GET_AGAIN
from .shapes import (
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
from .weight_files import Reader, incomplete, missing_files, read_folder_weights, read_json, read_mapped, weight_files

TOKENIZER = "tokenizer.model"
FORMAT, FORMAT_VERSION = MLLM_FORMAT, "1"
"""What the metadata of a converted file says it is."""

TOKENIZER_KEY = "tokenizer"
"""The tensor of a converted file that holds the bytes of `tokenizer.model`."""

SUFFIXES = (".json", ".model", ".bin", ".safetensors")
MAX_DEPTH = 4
"""How deep below a model folder checkpoints are looked for; enough for a hub snapshot."""

PARTS = {
    "vision": "model.vision_tower.vision_tower.vision_model.",
    "projector": "model.mm_projector.",
    "language": "model.",
}
"""The parts of a checkpoint, by the prefix of their weights in a published folder; the first that fits."""

_CONVERT = "Convert the model again with Convert MoMA MLLM."
_UNUSED = ("lm_head.weight",)
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".embeddings.position_ids")


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


def find_checkpoints(roots: Iterable[Path]) -> dict[str, Path]:
    """LLaVA folders and converted files at or below `roots`, by path relative to their root; the first root wins.

    Links are followed, but not back to a folder they lie in. Hidden folders are left out. Only files that are new or
    have changed are opened.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path = Path(folder)
            if CONFIG in files and kind_of(path / CONFIG) == LLAVA:
                found.setdefault(path.relative_to(root).as_posix() if path != root else root.name, path)
            for file in files:
                if file.endswith(".safetensors") and kind_of(path / file) == MLLM:
                    found.setdefault((path / file).relative_to(root).as_posix(), path / file)
            deep = len(path.relative_to(root).parts) >= MAX_DEPTH
            subfolders[:] = [] if deep else [name for name in subfolders if _leads_on(path / name)]
    return found


def absent_files(path: Path) -> list[str]:
    """Names of the files that a checkpoint folder lacks; none for a converted file.

    Raises:
        ValueError: An index file is unreadable.
    """
    return [] if path.is_file() else missing_files(path, [CONFIG, TOKENIZER, *weight_files(path)])


def checkpoint_files(path: Path) -> list[Path]:
    """The files a checkpoint consists of: a folder's, by name, or the one file itself."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)


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


def _leads_on(folder: Path) -> bool:
    """Whether to walk into a subfolder: it is not hidden, and no link back to a folder it lies in."""
    if folder.name.startswith("."):
        return False
    if not folder.is_symlink():
        return True
    try:
        real = folder.resolve(strict=True)
        return all(real != above.resolve() for above in folder.parents)
    except (OSError, RuntimeError):  # a link to itself is a RuntimeError before Python 3.13
        return False


def _read_folder(folder: Path, read: Reader) -> tuple[dict[str, Any], SentencePieceProcessor, dict[str, Tensor]]:
    config = read_json(folder / CONFIG)
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(incomplete(folder, [TOKENIZER]))
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
