"""Reading, checking, identifying and converting MoMA adapter files. Needs torch and safetensors only."""

import hashlib
import pickle
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LAYER_COUNT = 32
"""Attention layers of an SD1.5 UNet: 16 blocks with one self- and one cross-attention each."""

IMAGE_TOKENS = 4
ADAPTER_SUFFIXES = (".safetensors", ".th")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_GROUPS = ("projectors", "self_cross_attentions", "llm_mapping")
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
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")  # others may be converting it too
    metadata = {"format": "moma_adapter", "version": "1"}
    try:
        save_file({key: value.contiguous() for key, value in raw.items()}, partial, metadata=metadata)
        if _checked(_read_safetensors(partial), partial).identity != weights.identity:
            raise ValueError(f"{target} did not read back as written; {source} is unchanged.")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # A checkpoint of many gigabytes is refused by its names, before it is read.
            sources = _sources(file.keys(), path)
            # Copied: what stays mapped keeps the file from being replaced on Windows.
            return _usable({key: file.get_tensor(name).clone() for key, name in sources.items()}, path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        groups = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            # PyTorch's own words are left out: they advise to load the file without this protection.
            f"{path} was refused: it is truncated, not a PyTorch file, or holds code instead of weights. Nothing in it "
            "was run. Download it again from its source."
        ) from error
    except Exception as error:  # a broken pickle makes the reader fail in any way
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a readable PyTorch file (truncated download?): {reason[:300]}") from error
    if not isinstance(groups, Mapping):
        raise ValueError(f"{path} holds a {type(groups).__name__}, not the groups of a MoMA adapter.")
    missing = [name for name in _GROUPS if name not in groups]
    if missing:
        raise ValueError(f"{path} is not a MoMA adapter: group {missing[0]!r} is missing (found: {_listed(groups)}).")
    flat: dict[str, object] = {}
    for group in _GROUPS:
        if not isinstance(groups[group], Mapping):
            raise ValueError(f"{path}: group {group!r} holds a {type(groups[group]).__name__}, not named tensors.")
        flat |= {f"{group}.{key}": value for key, value in groups[group].items() if isinstance(key, str)}
    return _usable({key: flat[name] for key, name in _sources(flat, path).items()}, path)


def _sources(names: Collection[str], path: Path) -> dict[str, str]:
    """The file's name of each needed key; extra keys are ignored, as the released loader does."""
    if not any(name.startswith("projectors.") for name in names):
        raise ValueError(f"{path} is not a MoMA adapter: group 'projectors' is missing (found: {_listed(names)}).")
    wanted = {f"projectors.{key}": f"projectors.{key}" for key in _PROJECTOR_KEYS}
    for i in range(LAYER_COUNT):
        parts = ["to_k_ip.weight", "to_v_ip.weight"] + (["scale_learnable"] if i % 2 == 0 else [])
        wanted |= {f"self_cross_attentions.{i}.{part}": f"self_cross_attentions.{i}.{part}" for part in parts}
    for key in _MAPPING_KEYS:
        # The released file prefixes these with the module path they were trained under.
        matches = [name for name in names if name.startswith("llm_mapping.") and name.endswith(key)]
        wanted[f"llm_mapping.{key}"] = matches[0] if matches else f"llm_mapping.{key}"
    missing = [name for name in wanted.values() if name not in names]
    if missing:
        raise ValueError(f"{path} is not a complete MoMA adapter: key {missing[0]!r} is missing.")
    return wanted


def _usable(values: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """Check that each is a plain tensor of real numbers, all of them in the file."""
    usable = {}
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            raise ValueError(f"{path}: key {key!r} should be a floating-point tensor, found {_describe(value)}.")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{path}: key {key!r} is a tensor of a kind without plain values ({_describe(value)}).")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: key {key!r} claims {_describe(value)}, but the file holds fewer values.")
        usable[key] = value.detach()
    return usable


def _checked(raw: dict[str, Tensor], path: Path) -> AdapterWeights:
    """Check every shape against the sizes that the file itself implies; the networks are those of the released file."""
    context = _size(raw, "projectors.norm.weight", 1, 0, path)
    embedding = _size(raw, "projectors.proj.weight", 2, 1, path)
    hidden = _size(raw, "llm_mapping.mapping.gate_proj.weight", 2, 1, path)
    shapes: dict[str, tuple[int, ...]] = {
        "projectors.proj.weight": (IMAGE_TOKENS * context, embedding),
        "projectors.proj.bias": (IMAGE_TOKENS * context,),
        "projectors.norm.bias": (context,),
        "llm_mapping.mapping.gate_proj.weight": (embedding, hidden),
        "llm_mapping.mapping.up_proj.weight": (embedding, hidden),
        "llm_mapping.mapping.down_proj.weight": (embedding, embedding),
    }
    for i in range(LAYER_COUNT):
        channels = _size(raw, f"self_cross_attentions.{i}.to_k_ip.weight", 2, 0, path)
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


def _size(raw: dict[str, Tensor], key: str, dimensions: int, which: int, path: Path) -> int:
    """One size of a tensor, which must have so many dimensions and not be empty."""
    shape = tuple(raw[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{path}: key {key!r} has shape {shape}, expected {dimensions} dimension(s), none of size 0.")
    return shape[which]


def _expect(raw: dict[str, Tensor], key: str, shape: tuple[int, ...], path: Path) -> None:
    if tuple(raw[key].shape) != shape:
        raise ValueError(f"{path}: key {key!r} has shape {tuple(raw[key].shape)}, expected {shape}.")


def _listed(names: Iterable[object]) -> str:
    """The first few names, for a message."""
    return ", ".join(name[:60] for name in islice(names, 8) if isinstance(name, str)) or "nothing"


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
