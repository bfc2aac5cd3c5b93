"""Reading, checking, identifying and converting MoMA adapter files. Needs torch and safetensors only."""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LAYER_COUNT = 32
"""Attention layers of an SD1.5 UNet: 16 blocks with one self- and one cross-attention each."""

IMAGE_TOKENS = 4
ADAPTER_SUFFIXES = (".safetensors", ".th")

_PROJECTOR_KEYS = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
_MAPPING_KEYS = ("mapping.gate_proj.weight", "mapping.up_proj.weight", "mapping.down_proj.weight")


@dataclass(frozen=True)
class AdapterWeights:
    """The checked content of an adapter file, under the pack's own flat key names.

    Attributes:
        tensors: `projector.*`, `layers.{i}.to_k_ip.weight`, `layers.{i}.to_v_ip.weight` and `mapping.*`.
        scales: `scale_learnable` of the 16 self-attention layers, in layer order.
        identity: SHA-256 over names, dtypes, shapes and bytes; the same for a `.th` and its conversion.
    """

    tensors: dict[str, Tensor]
    scales: tuple[float, ...]
    identity: str

    @property
    def embedding_size(self) -> int:
        """Size of the subject embedding (1024 in the released adapter)."""
        return self.tensors["projector.proj.weight"].shape[1]

    @property
    def context_size(self) -> int:
        """Size of a text token embedding (768 for SD1.5)."""
        return self.tensors["projector.norm.weight"].shape[0]

    @property
    def hidden_size(self) -> int:
        """Size of the MLLM's hidden state that the mapping takes (4096 in the released adapter)."""
        return self.tensors["mapping.gate_proj.weight"].shape[1]

    def layer_size(self, layer: int) -> int:
        """Channels of attention layer `layer` (0..31)."""
        return self.tensors[f"layers.{layer}.to_k_ip.weight"].shape[0]


def read_adapter(path: Path) -> AdapterWeights:
    """Read and check an adapter, `attn_adapters_projectors.th` or its `.safetensors` form.

    Raises:
        ValueError: The file is unreadable, or a needed key is missing, misshapen or not finite. The message names it.
    """
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _checked(raw, path)


def convert_adapter(source: Path, target: Path) -> AdapterWeights:
    """Write the needed tensors of `source` to the `.safetensors` file `target`, unchanged in value and dtype.

    The target appears only once it is complete and reads back with the same identity; the source is kept.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"The target must end in .safetensors, got {target.name}.")
    raw = _read_safetensors(source) if source.suffix == ".safetensors" else _read_pickle(source)
    weights = _checked(raw, source)
    partial = target.with_name(target.name + ".part")
    save_file({k: v.contiguous() for k, v in raw.items()}, partial, metadata={"format": "moma_adapter", "version": "1"})
    if _checked(_read_safetensors(partial), partial).identity != weights.identity:
        partial.unlink()
        raise ValueError(f"{target} did not read back as written; {source} is unchanged.")
    partial.replace(target)
    return weights


def is_adapter_safetensors(path: Path) -> bool:
    """Whether a `.safetensors` file's header looks like an adapter (only the header is read)."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return "projectors.proj.weight" in names
    except (SafetensorError, OSError):
        return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    return _needed(tensors, path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        groups = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it is truncated, not a PyTorch file, or holds code instead of weights ({error})."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable PyTorch file (truncated download?): {error}") from error
    if not isinstance(groups, Mapping):
        raise ValueError(f"{path} holds a {type(groups).__name__}, not the groups of a MoMA adapter.")
    missing = [name for name in ("projectors", "self_cross_attentions", "llm_mapping") if name not in groups]
    if missing:
        found = ", ".join(map(str, list(groups)[:8])) or "nothing"
        raise ValueError(f"{path} is not a MoMA adapter: group {missing[0]!r} is missing (found: {found}).")
    flat: dict[str, object] = {}
    for group in ("projectors", "self_cross_attentions", "llm_mapping"):
        if not isinstance(groups[group], Mapping):
            raise ValueError(f"{path}: group {group!r} holds a {type(groups[group]).__name__}, not named tensors.")
        flat |= {f"{group}.{key}": value for key, value in groups[group].items()}
    return _needed(flat, path)


def _needed(tensors: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """Pick the needed keys under their canonical names; extra keys are ignored, as the released loader does."""
    wanted = {f"projectors.{key}": f"projectors.{key}" for key in _PROJECTOR_KEYS}
    for i in range(LAYER_COUNT):
        names = ["to_k_ip.weight", "to_v_ip.weight"] + (["scale_learnable"] if i % 2 == 0 else [])
        wanted |= {f"self_cross_attentions.{i}.{n}": f"self_cross_attentions.{i}.{n}" for n in names}
    for key in _MAPPING_KEYS:
        # The released file prefixes these with the module path they were trained under.
        matches = [name for name in tensors if name.startswith("llm_mapping.") and name.endswith(key)]
        wanted[f"llm_mapping.{key}"] = matches[0] if matches else f"llm_mapping.{key}"
    picked = {}
    for canonical, name in wanted.items():
        value = tensors.get(name)
        if value is None:
            raise ValueError(f"{path} is not a complete MoMA adapter: key {name!r} is missing.")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{path}: key {name!r} should be a floating-point tensor, found {_describe(value)}.")
        picked[canonical] = value.detach()
    return picked


def _checked(raw: dict[str, Tensor], path: Path) -> AdapterWeights:
    """Check every shape against the sizes the file itself implies (SPEC: the adapter file)."""
    context = raw["projectors.norm.weight"].shape[0]
    _expect(raw, "projectors.norm.weight", (context,), path)
    embedding = _width(raw, "projectors.proj.weight", path)
    hidden = _width(raw, "llm_mapping.mapping.gate_proj.weight", path)
    shapes: dict[str, tuple[int, ...]] = {
        "projectors.proj.weight": (IMAGE_TOKENS * context, embedding),
        "projectors.proj.bias": (IMAGE_TOKENS * context,),
        "projectors.norm.bias": (context,),
        "llm_mapping.mapping.gate_proj.weight": (embedding, hidden),
        "llm_mapping.mapping.up_proj.weight": (embedding, hidden),
        "llm_mapping.mapping.down_proj.weight": (embedding, embedding),
    }
    for i in range(LAYER_COUNT):
        channels = raw[f"self_cross_attentions.{i}.to_k_ip.weight"].shape[0]
        width = channels if i % 2 == 0 else context
        shapes[f"self_cross_attentions.{i}.to_k_ip.weight"] = (channels, width)
        shapes[f"self_cross_attentions.{i}.to_v_ip.weight"] = (channels, width)
        if i % 2 == 0:
            shapes[f"self_cross_attentions.{i}.scale_learnable"] = (1,)
    for key, shape in shapes.items():
        _expect(raw, key, shape, path)
    for key, tensor in raw.items():
        if not torch.isfinite(tensor.float().sum()):
            raise ValueError(f"{path}: key {key!r} holds NaN or infinite values.")
    tensors = {_module_name(key): value for key, value in raw.items() if not key.endswith("scale_learnable")}
    scales = tuple(float(raw[f"self_cross_attentions.{i}.scale_learnable"]) for i in range(0, LAYER_COUNT, 2))
    return AdapterWeights(tensors=tensors, scales=scales, identity=_identity(raw))


def _module_name(key: str) -> str:
    for group, name in (("projectors.", "projector."), ("self_cross_attentions.", "layers."), ("llm_mapping.", "")):
        if key.startswith(group):
            return name + key[len(group) :]
    raise KeyError(key)


def _identity(raw: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(raw):
        tensor = raw[key].contiguous()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _width(raw: dict[str, Tensor], key: str, path: Path) -> int:
    if raw[key].ndim != 2:
        raise ValueError(f"{path}: key {key!r} should have 2 dimensions, found shape {tuple(raw[key].shape)}.")
    return raw[key].shape[1]


def _expect(raw: dict[str, Tensor], key: str, shape: tuple[int, ...], path: Path) -> None:
    if tuple(raw[key].shape) != shape:
        raise ValueError(f"{path}: key {key!r} has shape {tuple(raw[key].shape)}, expected {shape}.")


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
