"""The sizes of a LLaVA-1.5 model, the weights it has by them, and their 8-bit form."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..download.release import GET_AGAIN

CONFIG = "config.json"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_QUANTIZABLE = re.compile(r"language\.layers\.\d+\.\w+\.\w+_proj\.weight")


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


def read_language_shape(config: dict[str, Any], path: Path) -> LanguageShape:
    if config.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(
            f"{path} is not a LLaVA-1.5 model: in {CONFIG}, mm_projector_type is {config.get('mm_projector_type')!r}, "
            "expected 'mlp2x_gelu'."
        )
    if config.get("mm_use_im_start_end") or config.get("rope_scaling"):
        raise ValueError(f"{path}: {CONFIG} asks for mm_use_im_start_end or rope_scaling, which MoMA does not use.")
    heads = _number(config, "num_attention_heads", path)
    shape = LanguageShape(
        hidden_size=int(_number(config, "hidden_size", path)),
        intermediate_size=int(_number(config, "intermediate_size", path)),
        layers=int(_number(config, "num_hidden_layers", path)),
        heads=int(heads),
        key_value_heads=int(_number(config, "num_key_value_heads", path, heads)),
        vocabulary=int(_number(config, "vocab_size", path)),
        norm_epsilon=float(_number(config, "rms_norm_eps", path, 1e-5)),
        rope_theta=float(_number(config, "rope_theta", path, 10000.0)),
    )
    if shape.hidden_size % shape.heads or shape.heads % shape.key_value_heads:
        raise ValueError(
            f"{path}: {CONFIG} has hidden_size {shape.hidden_size}, {shape.heads} heads and {shape.key_value_heads} "
            "key-value heads, which do not divide each other."
        )
    return shape


def _number(config: dict[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{path}: {CONFIG} lacks the entry {key!r}. {GET_AGAIN}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} in {CONFIG} is {value!r}, expected a positive number. {GET_AGAIN}")
    return value


def vision_layers(weights: Mapping[str, Tensor], path: Path) -> int:
    """How many layers of the vision tower there are: the published config does not say, the weights do."""
    numbers = [re.match(r"vision\.encoder\.layers\.(\d{1,4})\.", key) for key in weights]
    layers = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    if not layers:
        raise ValueError(f"{path} is incomplete: it has no layers of the vision tower. {GET_AGAIN}")
    return layers


def layers_in_use(layers: int, config: dict[str, Any], folder: Path) -> int:
    """LLaVA takes a hidden state from before the end; the layers after it need not exist."""
    select = config.get("mm_vision_select_layer", -2)
    if not isinstance(select, int) or not -layers <= select < 0:
        raise ValueError(
            f"{folder / CONFIG}: mm_vision_select_layer is {select!r}, the vision tower has {layers} layers."
        )
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(f"{folder / CONFIG}: mm_vision_select_feature must be 'patch'.")
    return layers + 1 + select


def is_in_use(key: str, layers: int) -> bool:
    match = re.match(r"vision\.encoder\.layers\.(\d{1,4})\.", key)
    return int(match[1]) < layers if match else not key.startswith("vision.post_layernorm.")


def read_vision_shape(weights: Mapping[str, Tensor], layers: int, heads: int | None, path: Path) -> VisionShape:
    patches = _need(weights, "vision.embeddings.patch_embedding.weight", 4, path).shape
    positions = _need(weights, "vision.embeddings.position_embedding.weight", 2, path).shape[0] - 1
    width = patches[0]
    return VisionShape(
        width=width,
        intermediate_size=_need(weights, "vision.encoder.layers.0.mlp.fc1.weight", 2, path).shape[0],
        layers=layers,
        heads=heads or max(width // 64, 1),
        patch_size=patches[2],
        image_size=patches[2] * math.isqrt(max(positions, 0)),
    )


def _need(weights: Mapping[str, Tensor], key: str, dimensions: int, path: Path) -> Tensor:
    if key not in weights:
        raise ValueError(f"MLLM {path} is incomplete: weight {key!r} is missing. {GET_AGAIN}")
    if weights[key].ndim != dimensions or 0 in weights[key].shape:
        raise ValueError(f"MLLM {path}: weight {key!r} has shape {tuple(weights[key].shape)}, which is not CLIP's.")
    return weights[key]


def _shapes(language: LanguageShape, vision: VisionShape) -> dict[str, tuple[int, ...]]:
    """Every weight of a LLaVA-1.5 model without lm_head, and its shape."""
    size, inner = language.hidden_size, language.intermediate_size
    narrow = size // language.heads * language.key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "language.embed_tokens.weight": (language.vocabulary, size),
        "language.norm.weight": (size,),
    }
    for i in range(language.layers):
        matrices = {"q": (size, size), "k": (narrow, size), "v": (narrow, size), "o": (size, size)}
        shapes |= {f"language.layers.{i}.self_attn.{key}_proj.weight": shape for key, shape in matrices.items()}
        matrices = {"gate": (inner, size), "up": (inner, size), "down": (size, inner)}
        shapes |= {f"language.layers.{i}.mlp.{key}_proj.weight": shape for key, shape in matrices.items()}
        shapes |= {f"language.layers.{i}.{key}_layernorm.weight": (size,) for key in ("input", "post_attention")}
    width, patches = vision.width, vision.image_size // vision.patch_size
    shapes |= {
        "vision.embeddings.class_embedding": (width,),
        "vision.embeddings.patch_embedding.weight": (width, 3, vision.patch_size, vision.patch_size),
        "vision.embeddings.position_embedding.weight": (patches**2 + 1, width),
        **_affine("vision.pre_layrnorm", width),
        **_affine("projector.0", size, width),
        **_affine("projector.2", size, size),
    }
    for i in range(vision.layers):
        layer = f"vision.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{layer}.self_attn.{name}", width, width)
        shapes |= _affine(f"{layer}.layer_norm1", width) | _affine(f"{layer}.layer_norm2", width)
        shapes |= _affine(f"{layer}.mlp.fc1", vision.intermediate_size, width)
        shapes |= _affine(f"{layer}.mlp.fc2", width, vision.intermediate_size)
    return shapes


def _affine(name: str, rows: int, *columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


def check_weights(weights: Mapping[str, Tensor], language: LanguageShape, vision: VisionShape, path: Path) -> None:
    """Check names, shapes and dtypes of all weights.

    Raises:
        ValueError: Naming the first that is missing, unknown or wrong.
    """
    if language.layers > len(weights):
        raise ValueError(f"MLLM {path} is incomplete: {CONFIG} asks for {language.layers} layers. {GET_AGAIN}")
    shapes = _shapes(language, vision)
    missing = sorted(set(shapes) - set(weights))
    if missing:
        raise ValueError(f"MLLM {path} is incomplete: weight {missing[0]!r} is missing. {GET_AGAIN}")
    scales = {key + SCALE_SUFFIX: key for key in shapes if is_quantized(key, weights[key])}
    unknown = sorted(set(weights) - set(shapes) - set(scales))
    if unknown:
        raise ValueError(f"MLLM {path}: weight {unknown[0]!r} has no place in a LLaVA-1.5 model.")
    for key, shape in shapes.items():
        tensor = weights[key]
        if tuple(tensor.shape) != shape or not (tensor.dtype in DTYPES or is_quantized(key, tensor)):
            raise ValueError(
                f"MLLM {path}: weight {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected a 16- or 32-bit "
                f"floating-point one of shape {shape}."
            )
    for name, key in scales.items():
        _check_scale(weights.get(name), name, shapes[key][:1], path)


def _check_scale(scale: Tensor | None, name: str, shape: tuple[int, ...], path: Path) -> None:
    if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != shape or not scale.isfinite().all():
        found = "missing" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
        raise ValueError(
            f"MLLM {path}: {name!r}, which scales an 8-bit weight, is {found}; expected finite float32 {shape}."
        )


def is_quantized(key: str, weight: Tensor) -> bool:
    """Whether `key` is a matrix of a language layer, held in 8 bit."""
    return weight.dtype in QUANTIZED_DTYPES and _QUANTIZABLE.fullmatch(key) is not None


def is_quantizable(key: str) -> bool:
    """Whether `key` is a matrix of a language layer: these, and only these, may be in 8 bit."""
    return _QUANTIZABLE.fullmatch(key) is not None


SCALE_SUFFIX = "_scale"
"""`x.weight` in 8 bit comes with `x.weight_scale`, float32 [rows]."""

QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric absmax quantisation of each row (LLM.int8(), arXiv 2208.07339, section 2.1, for weights alone).

    Args:
        weight: [rows, columns], floating-point and finite.
        dtype: One of `QUANTIZED_DTYPES`.

    Returns:
        The weight [rows, columns] in `dtype`, and float32 [rows] so that `quantized * scale[:, None]` is the weight.
    """
    values = weight.float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = values.abs().amax(dim=1) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    values = values / scale[:, None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale
