"""A checkpoint as one `.safetensors` file, in the same or a smaller precision.

The file is written tensor by tensor, so the memory needed is a few times that of the largest tensor. Work that was
broken off goes on where it stopped: beside the unfinished `*.part`, a journal holds the digest of each tensor written.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from ..host.disk import CHUNK, Report, check_space, content_hash, locked
from ..host.weight_files import read_header
from .checkpoint import PARTS, TOKENIZER_KEY, Checkpoint, read_checkpoint
from .checkpoint_files import FORMAT, FORMAT_VERSION, checkpoint_identity
from .weights import SCALE_SUFFIX, is_quantizable, is_quantized, quantize_rows

PRECISIONS = ("keep", "bf16", "fp16", "fp8", "int8")
"""What the weights can be stored in. `fp8` and `int8` are for the matrices of the language layers; the rest is kept."""

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the file: bytes `start` to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class _Plan:
    """What the file will hold.

    Attributes:
        header: The bytes before the data, as the format has them: length, JSON, padding.
        slots: By name, in the order of the file.
        size: Bytes of the whole file.
    """

    header: bytes
    slots: dict[str, _Slot]
    size: int


def convert_mllm(source: Path, target: Path, precision: str, report: Report) -> None:
    """Write the checkpoint `source`, without the parts that are not used, to the one file `target`.

    The target appears only once it is complete and was read back as written. The source is kept. A target that is
    there and came from the same source in the same way is left as it is.

    Args:
        source: A folder, or a converted file that is not in 8 bit.
        target: Ends in `.safetensors`, in a folder that is there.
        precision: One of `PRECISIONS`.
        report: Gets the bytes written and those read back; may raise to stop.

    Raises:
        ValueError: The source is no good (`read_checkpoint`), in 8 bit already, or does not fit the precision; the
            target is in the way, or did not read back as written.
        OSError: A file cannot be read or written; ENOSPC if the disk is or would be full.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}.")
    if target.suffix != ".safetensors":
        raise ValueError(f"The target must end in .safetensors, got {target.name}.")
    if not target.parent.is_dir():
        raise ValueError(f"The folder of the target, {target.parent}, is not there.")
    checkpoint = read_checkpoint(source)
    tensors = _tensors(checkpoint, source)
    plan = _plan(tensors, _metadata(checkpoint, source, precision), precision)
    with locked(target, lambda: report(0, 2 * plan.size, "Another process writes this file; waiting for it")):
        if not _is_there(target, plan):
            _write_and_check(tensors, target, plan, precision, report)
    report(2 * plan.size, 2 * plan.size, "Done")


def _tensors(checkpoint: Checkpoint, source: Path) -> dict[str, Tensor]:
    """Everything that goes into the file, as it is in the source."""
    tensors = {TOKENIZER_KEY: _bytes(checkpoint.tokenizer.serialized_model_proto())}
    for part in PARTS:
        tensors |= {f"{part}.{key}": value for key, value in getattr(checkpoint, part).items()}
    if any(is_quantized(key, tensor) for key, tensor in tensors.items()):
        raise ValueError(f"{source} is in 8 bit already: convert the checkpoint that it was made from.")
    return tensors


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _metadata(checkpoint: Checkpoint, source: Path, precision: str) -> dict[str, str]:
    """The file's metadata; `source` tells different sources apart."""
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "precision": precision,
        "source": checkpoint_identity(source),
        "config": json.dumps(checkpoint.config, sort_keys=True),
    }


def _plan(tensors: Mapping[str, Tensor], metadata: dict[str, str], precision: str) -> _Plan:
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        forms |= _forms(key, tensor, precision)
    # Widest first, so that each starts at a multiple of its item size, without which it cannot be mapped.
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset, places = 0, []
    for name in names:
        dtype, shape = forms[name]
        end = offset + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (offset, end)}
        places.append((name, offset, end))
        offset = end
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    header = struct.pack("<Q", len(content)) + content
    base = len(header)
    slots = {name: _Slot(*forms[name], base + start, base + end) for name, start, end in places}
    return _Plan(header, slots, base + offset)


def _forms(key: str, tensor: Tensor, precision: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that a tensor of the source becomes."""
    shape = tuple(tensor.shape)
    if precision in _EIGHT_BIT and is_quantizable(key):
        return {key: (_EIGHT_BIT[precision], shape), key + SCALE_SUFFIX: (torch.float32, shape[:1])}
    return {key: (tensor.dtype if key == TOKENIZER_KEY else _CASTS.get(precision, tensor.dtype), shape)}


def _converted(key: str, tensor: Tensor, precision: str) -> tuple[Tensor, ...]:
    """The tensors of `_forms`, in its order."""
    if key == TOKENIZER_KEY or precision == "keep":
        return (tensor,)
    if precision in _CASTS:
        tensor = tensor.to(_CASTS[precision])
    if not tensor.isfinite().all():
        raise ValueError(f"Weight {key!r} holds values that are not finite, or too large for {precision}.")
    if precision in _EIGHT_BIT and is_quantizable(key):
        return quantize_rows(tensor, _EIGHT_BIT[precision])
    return (tensor,)


def _is_there(target: Path, plan: _Plan) -> bool:
    """Whether an earlier or another process's conversion of the same source made the target.

    Raises:
        ValueError: The target is something else.
    """
    if not target.exists():
        return False
    with target.open("rb") as file:
        if file.read(len(plan.header)) == plan.header and target.stat().st_size == plan.size:
            return True
    raise ValueError(f"{target} is there already and is not this conversion: remove it, or choose another name.")


def _write_and_check(tensors: Mapping[str, Tensor], target: Path, plan: _Plan, precision: str, report: Report) -> None:
    part = target.with_name(target.name + ".part")
    journal = target.with_name(target.name + ".journal")
    if part.is_symlink() or journal.is_symlink():
        raise ValueError(f"{part} or {journal.name} is a link: remove it.")
    digests = _resumed(part, journal, plan)
    check_space(
        target.parent, plan.size - sum(plan.slots[name].end - plan.slots[name].start for name in digests), target.name
    )
    try:
        with part.open("r+b" if digests else "wb") as file, journal.open("w", encoding="utf-8") as notes:
            _write(tensors, file, notes, digests, plan, precision, report)
    except OSError as error:
        raise OSError(
            error.errno, f"{part} could not be written ({error.strerror}). Convert again to go on where it stopped"
        ) from error
    try:
        _read_back(part, plan, digests, report)
    except ValueError:
        part.unlink()
        journal.unlink()
        raise
    part.replace(target)
    journal.unlink()


def _resumed(part: Path, journal: Path, plan: _Plan) -> dict[str, str]:
    """Digests of the tensors that an earlier try at the same plan has written; empty to start over."""
    try:
        first, *lines = journal.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if not part.is_file() or first != _digest(plan):
        return {}
    size = part.stat().st_size
    pairs = [line.split(" ") for line in lines]
    return {
        pair[0]: pair[1]
        for pair in pairs  # the last line may be torn
        if len(pair) == 2 and len(pair[1]) == 64 and pair[0] in plan.slots and plan.slots[pair[0]].end <= size
    }


def _digest(plan: _Plan) -> str:
    return content_hash(plan.header)


def _write(
    tensors: Mapping[str, Tensor],
    file: BinaryIO,
    notes: TextIO,
    digests: dict[str, str],
    plan: _Plan,
    precision: str,
    report: Report,
) -> None:
    """Write what `digests` lacks, and add it there and to the journal."""
    notes.write(
        "".join(f"{line}\n" for line in [_digest(plan), *(f"{name} {value}" for name, value in digests.items())])
    )
    file.write(plan.header)
    done = len(plan.header) + sum(plan.slots[name].end - plan.slots[name].start for name in digests)
    for key, tensor in tensors.items():
        names = list(_forms(key, tensor, precision))
        if all(name in digests for name in names):
            continue
        for name, value in zip(names, _converted(key, tensor, precision), strict=True):
            digest = hashlib.sha256()
            file.seek(plan.slots[name].start)
            for chunk in _chunks(value):
                report(done, 2 * plan.size, "Writing")
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
            digests[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())  # piece by piece: at the end it could take a minute in which nobody can cancel
        notes.write("".join(f"{name} {digests[name]}\n" for name in names))
        notes.flush()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(content), CHUNK):
        yield content[start : start + CHUNK]


def _read_back(part: Path, plan: _Plan, digests: Mapping[str, str], report: Report) -> None:
    """Check the file against what was written: header, digests of all tensors, and that the library reads it."""
    good = True
    with part.open("rb") as file:
        good &= file.read(len(plan.header)) == plan.header
        for name, slot in plan.slots.items():
            digest = hashlib.sha256()
            for start in range(slot.start, slot.end, CHUNK):
                report(plan.size + start, 2 * plan.size, "Checking")
                digest.update(file.read(min(CHUNK, slot.end - start)))
            good &= digest.hexdigest() == digests[name]
    if good and part.stat().st_size == plan.size:
        try:
            good = set(read_header(part).tensors) == set(plan.slots)
        except ValueError:
            good = False
    if not good:
        raise ValueError(f"{part} did not read back as written and was removed (bad disk?). The source is unchanged.")
