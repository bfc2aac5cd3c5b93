"""What the MLLM's weights are kept in and what it computes in, and how `auto` chooses."""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from .leaves import NF4_BLOCK, CastLinear, Fp8Linear, Int8Linear, Nf4Linear
from .weights import SCALE_SUFFIX

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

_CAST_ROOM = 1.5
"""Times the weights' size that must be free in RAM to cast them once: the half is for all else that runs. Once more
where ComfyUI reads files into RAM."""


@dataclass(frozen=True)
class Plan:
    """How an MLLM is kept and computed.

    Attributes:
        storage: A key of `PACKED`, or None for the weights as they are in the file.
        compute_dtype: What the forward pass computes in: the dtype of every layer's input. Inside, LLaMA's norms and
            rotary angles are float32 by definition, and what is 8-bit, see `leaves.Int8Linear`.
        summary: One line for the user: what was chosen, and why.
        cast_once: Matrices are cast to the dtype computed in while they are read, not at each use: in RAM they are the
            process's own then, no pages of the file.
    """

    storage: str | None
    compute_dtype: torch.dtype
    summary: str = field(compare=False)
    cast_once: bool = False


@dataclass(frozen=True)
class Machine:
    """What a plan depends on beside the file.

    Attributes:
        device: Where it computes.
        free: Bytes that weights could have there (other models of ComfyUI's go when room is needed).
        ram: Bytes that they could have in RAM.
        fast_dtype: What the device is fastest in, as far as ComfyUI knows.
        bf16_gain: For a CPU, how many times as fast as fp32 bf16 is; decides there.
        holds_fp8: Whether the device can hold fp8.
        holds_cast: Whether these weights, cast once, are in RAM already and need no room there.
    """

    device: torch.device
    free: int
    ram: int
    fast_dtype: torch.dtype = torch.float32
    bf16_gain: float | None = None
    holds_fp8: bool = True
    holds_cast: bool = False

    @classmethod
    def measure(cls, device: torch.device) -> "Machine":
        """This machine, now: what is free less what ComfyUI keeps free for computing."""
        ram = int(comfy.model_management.get_free_memory(torch.device("cpu")))
        fp8 = comfy.model_management.supports_cast(device, torch.float8_e4m3fn)
        if device.type == "cpu":
            return cls(device, ram, ram, bf16_gain=cpu_bf16_gain(), holds_fp8=fp8)
        free = comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
        held = sum(m.model_loaded_memory() for m in comfy.model_management.current_loaded_models if m.device == device)
        fast = torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32
        fast = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else fast
        return cls(device, max(int(free + held), 0), ram, fast, holds_fp8=fp8)

    @property
    def best_dtype(self) -> torch.dtype:
        """What to compute in where the user leaves it open."""
        if self.bf16_gain is None:
            return self.fast_dtype
        return torch.bfloat16 if self.bf16_gain > _CPU_GAIN else torch.float32


def make_plan(precision: str, weights: Mapping[str, Tensor], machine: Machine) -> Plan:
    """How to run these weights on this machine.

    `auto` takes the weights as they are in the file, in the dtype that the device is fastest at. Only where they fit
    neither on the device nor, to be streamed from there, in RAM, it takes fp8. On a CPU that is fast at bf16, weights
    of another dtype are cast to it once where RAM has room for that, unless a packed precision is chosen.

    Args:
        precision: One of `PRECISIONS`.
        weights: All weights of the file by their names in `MllmModule`.

    Raises:
        ValueError: The file, the device or a missing library stands against this precision; says what to do.
    """
    device, in_file = machine.device, stored_as(weights)
    storage = precision if precision in PACKED and precision != in_file else None
    _check_storage(storage, in_file, machine)
    dtype = _DTYPES.get(precision, machine.best_dtype)
    why = ""
    if precision not in _DTYPES and machine.bf16_gain is not None:
        why = f" (bf16 is {machine.bf16_gain:.1f} times as fast as fp32 here)"
    size = packed_size(weights, storage, dtype)
    if (
        precision == "auto"
        and in_file is None
        and size > max(machine.free, machine.ram)
        and device.type != "cpu"
        and machine.holds_fp8
    ):
        why = f" because the file's {_gb(size)} fit neither there nor in {_gb(machine.ram)} of free RAM"
        storage, size = "fp8", packed_size(weights, "fp8", dtype)
    kept = storage or in_file or _name(next(t.dtype for key, t in weights.items() if is_language_matrix(key)))
    cast_once = False
    if device.type == "cpu" and dtype == torch.bfloat16 and precision not in PACKED and kept != _name(dtype):
        cast_size = packed_size(weights, None, dtype, cast_once=True)
        room = (_CAST_ROOM + comfy.utils.DISABLE_MMAP) * cast_size
        cast_once = machine.holds_cast or machine.ram >= room
        if cast_once:
            size, kept = cast_size, f"{_name(dtype)}, cast once from {kept}"
        else:
            kept += f", cast at each look ({_gb(room)} of free RAM would do it once)"
    computing = f"computing in {_name(dtype)}{_products(storage, device)}"
    summary = f"{precision}: weights in {kept}, {computing} on {device}{why}; {_gb(size)}"
    if device.type != "cpu":
        fits = size <= machine.free
        summary += f", {'all' if fits else _gb(machine.free)} on the card" + ("" if fits else ", the rest streamed")
    return Plan(storage, dtype, summary, cast_once)


def _products(storage: str | None, device: torch.device) -> str:
    """What a summary says of products that are not in the dtype computed in: bitsandbytes' 8-bit ones, off the CPU."""
    return " (products in int8, outliers in fp16)" if storage == "8-bit" and device.type != "cpu" else ""


def stored_as(weights: Mapping[str, Tensor]) -> str | None:
    """`fp8` or `8-bit` for a file with row-wise packed weights, else None."""
    for key in weights:
        if key.endswith(SCALE_SUFFIX):
            return _IN_FILE.get(weights[key.removesuffix(SCALE_SUFFIX)].dtype)
    return None


def is_language_matrix(key: str) -> bool:
    """Whether a weight, by its name in `MllmModule`, is one that `PACKED` applies to: 94% of all values."""
    return key.startswith("language.layers.") and key.endswith("_proj.weight")


def is_kept(key: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a weight stays in the file's dtype and is cast at each use, as matrices with their biases and scales do.

    The others (norms, the class embedding, the patch convolution: 0.01 % of all values) are loaded in the dtype
    computed in.
    """
    matrix = weights.get(key.rpartition(".")[0] + ".weight")
    return matrix is not None and matrix.ndim == 2


def is_table(key: str) -> bool:
    """Whether a weight, by its name in `MllmModule`, is a table of which each look takes some rows."""
    return key.endswith(("embed_tokens.weight", "position_embedding.weight"))


def packed_size(weights: Mapping[str, Tensor], storage: str | None, dtype: torch.dtype, cast_once: bool = False) -> int:
    """Bytes of these weights once they are loaded.

    Args:
        storage: What the language model's matrices are packed in, a key of `PACKED`.
        dtype: What is computed in.
        cast_once: See `Plan`.
    """
    total = 0.0
    for key, tensor in weights.items():
        if cast_once and not is_table(key):
            total += 0 if key.endswith(SCALE_SUFFIX) else tensor.numel() * dtype.itemsize
        elif storage and is_language_matrix(key):
            scales = 0 if storage == "4-bit" else 4 * tensor.shape[0]
            total += _PACKED_BYTES[storage] * tensor.numel() + scales
        else:
            total += tensor.nbytes if is_kept(key, weights) else tensor.numel() * dtype.itemsize
    return int(total)


@cache
def cpu_bf16_gain() -> float:
    """How many times as fast as fp32 this CPU multiplies matrices in bf16.

    Measured, in some tenths of a second: what a CPU can does not tell what the installed torch makes of it. Once per
    process: two loads of one model are to agree.
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
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _check_storage(storage: str | None, in_file: str | None, machine: Machine) -> None:
    if "fp8" in (storage, in_file) and not machine.holds_fp8:
        raise ValueError(
            f"precision: {machine.device} cannot hold fp8. Choose auto with the 16-bit files, or with a file "
            "converted to int8."
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
