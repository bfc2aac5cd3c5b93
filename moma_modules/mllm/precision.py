"""What the MLLM's weights are kept in and what it computes in, and how `auto` chooses."""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import comfy.model_management
import torch
from torch import Tensor

from .leaves import NF4_BLOCK, CastLinear, Fp8Linear, Int8Linear, Nf4Linear
from .quantize import SCALE_SUFFIX

PRECISIONS = ("auto", "bf16", "fp16", "fp8", "8-bit", "4-bit", "fp32")
"""bf16, fp16 and fp32 are what it computes in; fp8, 8-bit and 4-bit what the language model's matrices are kept in."""

PACKED: Mapping[str, type[CastLinear]] = {"fp8": Fp8Linear, "8-bit": Int8Linear, "4-bit": Nf4Linear}
"""What the matrices of the language model become while they are read from a 16-bit file."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_IN_FILE = {torch.int8: "8-bit", torch.float8_e4m3fn: "fp8"}
_PACKED_BYTES = {"fp8": 1.0, "8-bit": 1.0, "4-bit": 0.5 + 4 / NF4_BLOCK}
_CPU_TOKENS, _CPU_SIZE = 64, 2048
_CPU_GAIN = 1.25
"""How much faster than fp32 bf16 must be on a CPU to be worth its rounding."""


@dataclass(frozen=True)
class Plan:
    """How an MLLM is kept and computed.

    Attributes:
        storage: A key of `PACKED`, or None for the weights as they are in the file.
        compute_dtype: What the forward pass computes in.
        summary: One line for the user: what was chosen, and why.
    """

    storage: str | None
    compute_dtype: torch.dtype
    summary: str = field(compare=False)


@dataclass(frozen=True)
class Memory:
    """Bytes that weights could have: on the device (other models of ComfyUI's go when room is needed) and in RAM."""

    device: int
    ram: int

    @classmethod
    def measure(cls, device: torch.device) -> "Memory":
        """What is free now, less what ComfyUI keeps free for computing."""
        ram = comfy.model_management.get_free_memory(torch.device("cpu"))
        if device.type == "cpu":
            return cls(int(ram), int(ram))
        free = comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
        held = sum(m.model_loaded_memory() for m in comfy.model_management.current_loaded_models if m.device == device)
        return cls(max(int(free + held), 0), int(ram))


def make_plan(
    precision: str, weights: Mapping[str, Tensor], device: torch.device, memory: Memory | None = None
) -> Plan:
    """How to run these weights on this device.

    `auto` takes the weights as they are in the file, in the dtype that the device is fastest at. Only where they fit
    neither on the device nor, to be streamed from there, in RAM, it takes fp8.

    Args:
        precision: One of `PRECISIONS`.
        weights: All weights of the file by name, see `language_matrices`.
        memory: What there is; measured where None.

    Raises:
        ValueError: The file, the device or a missing library stands against this precision; says what to do.
    """
    memory = memory or Memory.measure(device)
    in_file = stored_as(weights)
    storage = precision if precision in PACKED and precision != in_file else None
    _check_storage(storage, in_file, device)
    dtype, why = _compute_dtype(precision, weights, device)
    size = packed_size(weights, storage)
    if (
        precision == "auto"
        and in_file is None
        and size > max(memory.device, memory.ram)
        and device.type != "cpu"
        and comfy.model_management.supports_cast(device, torch.float8_e4m3fn)
    ):
        why = f" because the file's {_gb(size)} fit neither there nor in {_gb(memory.ram)} of free RAM"
        storage, size = "fp8", packed_size(weights, "fp8")
    kept = storage or in_file or _name(next(t.dtype for key, t in weights.items() if is_language_matrix(key)))
    summary = f"{precision}: weights in {kept}, computing in {_name(dtype)} on {device}{why}; {_gb(size)}"
    if device.type != "cpu":
        fits = size <= memory.device
        summary += f", {'all' if fits else _gb(memory.device)} on the card" + ("" if fits else ", the rest streamed")
    return Plan(storage, dtype, summary)


def stored_as(weights: Mapping[str, Tensor]) -> str | None:
    """`fp8` or `8-bit` for a file with row-wise packed weights, else None."""
    for key in weights:
        if key.endswith(SCALE_SUFFIX):
            return _IN_FILE.get(weights[key.removesuffix(SCALE_SUFFIX)].dtype)
    return None


def is_language_matrix(key: str) -> bool:
    """Whether a weight, by its name in `MllmModule`, is one that `PACKED` applies to: 94% of all values."""
    return key.startswith("language.layers.") and key.endswith("_proj.weight")


def packed_size(weights: Mapping[str, Tensor], storage: str | None) -> int:
    """Bytes of these weights once the language model's matrices are packed."""
    total = 0.0
    for key, tensor in weights.items():
        if storage and is_language_matrix(key):
            scales = 0 if storage == "4-bit" else 4 * tensor.shape[0]
            total += _PACKED_BYTES[storage] * tensor.numel() + scales
        else:
            total += tensor.nbytes
    return int(total)


def fastest_cpu_dtype() -> tuple[torch.dtype, float]:
    """bf16 or fp32, whichever multiplies matrices sooner here, and how many times as fast bf16 is.

    Measured: what a CPU can does not tell what the installed torch makes of it. Takes some tenths of a second.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(_CPU_TOKENS, _CPU_SIZE, dtype=dtype), torch.ones(_CPU_SIZE, _CPU_SIZE, dtype=dtype)
        runs = []
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    return (torch.bfloat16 if gain > _CPU_GAIN else torch.float32), gain


def _compute_dtype(precision: str, weights: Mapping[str, Tensor], device: torch.device) -> tuple[torch.dtype, str]:
    if precision in _DTYPES:
        return _DTYPES[precision], ""
    if device.type == "cpu":
        dtype, gain = fastest_cpu_dtype()
        return dtype, f" (bf16 is {gain:.1f} times as fast as fp32 here)"
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16, ""
    return (torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32), ""


def _check_storage(storage: str | None, in_file: str | None, device: torch.device) -> None:
    if "fp8" in (storage, in_file) and not comfy.model_management.supports_cast(device, torch.float8_e4m3fn):
        raise ValueError(
            f"precision: {device} cannot hold fp8. Choose auto with the 16-bit files, or with a file converted to int8."
        )
    if storage is None:
        return
    if in_file is not None:
        raise ValueError(
            f"precision: {storage} is made from 16-bit weights, but this file holds them in {in_file}. Choose auto or "
            f"{in_file}, or load the 16-bit files."
        )
    if storage in ("8-bit", "4-bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"precision: {storage} needs bitsandbytes, which is not installed. Install it into ComfyUI's Python "
            "(python -m pip install bitsandbytes) and restart ComfyUI, or choose auto or fp8, which do without."
        )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
