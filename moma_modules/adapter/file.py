"""Reading, checking, identifying and converting MoMA adapter files. Needs torch and safetensors only."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..host.disk import content_hash, written_whole
from ..host.weight_files import read_header, read_pickle, read_safetensors, summary
from .networks import LAYER_COUNT, AdapterModule, AdapterSizes

ADAPTER_SUFFIXES = (".safetensors", ".th")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_MODULES = {"projectors": "projector.", "self_cross_attentions": "layers.", "llm_mapping": ""}
"""The groups of a file, and how the names of their weights begin in `AdapterModule`."""
_SCALE = "scale_learnable"
_REFERENCE_SIZE = "reference_size"
"""An entry beside the groups, one number; the released file has none."""
RELEASED_REFERENCE_SIZE = 512
_REFERENCE_SIZES = range(64, 2049, 64)
_PROJECTOR_KEYS = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
_MAPPING_KEYS = ("mapping.gate_proj.weight", "mapping.up_proj.weight", "mapping.down_proj.weight")


@dataclass(frozen=True)
class AdapterWeights:
    """The checked content of an adapter file.

    Attributes:
        tensors: By their names in `AdapterModule`.
        sizes: As the file implies them.
        scales: `scale_learnable` of the 16 self-attention layers, in layer order.
        reference_size: Side in pixels of the references that it was trained with.
        identity: SHA-256 over names, dtypes, shapes and bytes; the same for a `.th` and its conversion.
    """

    tensors: dict[str, Tensor]
    sizes: AdapterSizes
    scales: tuple[float, ...]
    reference_size: int
    identity: str


def is_adapter(path: Path) -> bool:
    """Whether a file looks like an adapter, as far as its header tells; `.th` files have none."""
    found = summary(path) if path.suffix == ".safetensors" else None
    return path.suffix == ".th" or (found is not None and "projectors" in found.groups)


def read_adapter(path: Path) -> AdapterWeights:
    """Read and check an adapter, `attn_adapters_projectors.th` or its `.safetensors` form.

    Raises:
        ValueError: The file is unreadable, or a needed key is missing, misshapen or not finite. The message names it.
    """
    return _checked(_read(path), path)


def convert_adapter(source: Path, target: Path) -> AdapterWeights:
    """Write the needed tensors of `source` to the `.safetensors` file `target`, unchanged in value and dtype.

    The target appears only once it is complete and reads back with the same identity; the source is kept.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"The target must end in .safetensors, got {target.name}.")
    raw = _read(source)
    weights = _checked(raw, source)
    metadata = {"format": "moma_adapter", "version": "1"}
    with written_whole(target) as partial:
        partial.write_bytes(save({key: value.contiguous() for key, value in raw.items()}, metadata))
        if _checked(_read_safetensors(partial), partial).identity != weights.identity:
            raise ValueError(f"{target} did not read back as written; {source} is unchanged.")
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # A checkpoint of many gigabytes is refused by its names, before it is read.
    sources = _sources(read_header(path).tensors, path)
    tensors = read_safetensors(path, sources.values())
    return _usable({key: tensors[name] for key, name in sources.items()}, path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    groups = read_pickle(path, "Download it again from its source.")
    if not isinstance(groups, Mapping):
        raise ValueError(f"{path} holds a {type(groups).__name__}, not the groups of a MoMA adapter.")
    missing = [name for name in _MODULES if name not in groups]
    if missing:
        raise ValueError(f"{path} is not a MoMA adapter: group {missing[0]!r} is missing (found: {_listed(groups)}).")
    flat: dict[str, object] = {}
    for group in _MODULES:
        if not isinstance(groups[group], Mapping):
            raise ValueError(f"{path}: group {group!r} holds a {type(groups[group]).__name__}, not named tensors.")
        flat |= {f"{group}.{key}": value for key, value in groups[group].items() if isinstance(key, str)}
    if _REFERENCE_SIZE in groups:
        flat[_REFERENCE_SIZE] = groups[_REFERENCE_SIZE]
    return _usable({key: flat[name] for key, name in _sources(flat, path).items()}, path)


def _sources(names: Collection[str], path: Path) -> dict[str, str]:
    """The file's name of each needed key; extra keys are ignored, as the released loader does."""
    if not any(name.startswith("projectors.") for name in names):
        raise ValueError(f"{path} is not a MoMA adapter: group 'projectors' is missing (found: {_listed(names)}).")
    wanted = {f"projectors.{key}": f"projectors.{key}" for key in _PROJECTOR_KEYS}
    for i in range(LAYER_COUNT):
        parts = ["to_k_ip.weight", "to_v_ip.weight"] + ([_SCALE] if i % 2 == 0 else [])
        wanted |= {f"self_cross_attentions.{i}.{part}": f"self_cross_attentions.{i}.{part}" for part in parts}
    for key in _MAPPING_KEYS:
        # The released file prefixes these with the module path they were trained under.
        matches = [name for name in names if name.startswith("llm_mapping.") and name.endswith(key)]
        wanted[f"llm_mapping.{key}"] = matches[0] if matches else f"llm_mapping.{key}"
    if _REFERENCE_SIZE in names:
        wanted[_REFERENCE_SIZE] = _REFERENCE_SIZE
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
    """Check every shape against the networks of the sizes that the file itself implies."""
    sizes = AdapterSizes(
        embedding=_size(raw, "projectors.proj.weight", 2, 1, path),
        context=_size(raw, "projectors.norm.weight", 1, 0, path),
        hidden=_size(raw, "llm_mapping.mapping.gate_proj.weight", 2, 1, path),
        layers=tuple(_size(raw, f"self_cross_attentions.{i}.to_k_ip.weight", 2, 0, path) for i in range(LAYER_COUNT)),
    )
    identity = content_hash(*(part for key in sorted(raw) for part in (f"{key}|", raw[key])))
    raw = dict(raw)
    reference_size = _reference_size(raw.pop(_REFERENCE_SIZE, None), path)
    networks = AdapterModule(sizes, device="meta", dtype=None, operations=nn).state_dict()
    tensors, scales = {}, []
    for key, tensor in raw.items():
        group, _, name = key.partition(".")
        shape = (1,) if name.endswith(_SCALE) else tuple(networks[_MODULES[group] + name].shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: key {key!r} has shape {tuple(tensor.shape)}, expected {shape}.")
        if not torch.isfinite(tensor.float().sum()):
            raise ValueError(f"{path}: key {key!r} holds NaN or infinite values.")
        if name.endswith(_SCALE):
            scales.append(float(tensor))
        else:
            tensors[_MODULES[group] + name] = tensor
    return AdapterWeights(tensors, sizes, tuple(scales), reference_size, identity)


def _reference_size(found: Tensor | None, path: Path) -> int:
    if found is None:
        return RELEASED_REFERENCE_SIZE
    if found.numel() != 1 or float(found) not in _REFERENCE_SIZES:
        raise ValueError(
            f"{path}: {_REFERENCE_SIZE} is {found.flatten().tolist()[:4]}, expected one number of pixels, a multiple "
            f"of {_REFERENCE_SIZES.step} from {_REFERENCE_SIZES[0]} to {_REFERENCE_SIZES[-1]}."
        )
    return int(found)


def _size(raw: dict[str, Tensor], key: str, dimensions: int, which: int, path: Path) -> int:
    """One size of a tensor, which must have so many dimensions and not be empty."""
    shape = tuple(raw[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{path}: key {key!r} has shape {shape}, expected {dimensions} dimension(s), none of size 0.")
    return shape[which]


def _listed(names: Iterable[object]) -> str:
    """The first few names, for a message."""
    return ", ".join(name[:60] for name in islice(names, 8) if isinstance(name, str)) or "nothing"


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
