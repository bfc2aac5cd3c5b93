"""Reading files of named weights (`.safetensors`, PyTorch's own format) and JSON. No code in a file is run."""

import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Header:
    """What a `.safetensors` file says of itself.

    Attributes:
        metadata: Texts by name.
        tensors: By name the dtype, in the format's own words ("F32"), and the shape.
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Summary:
    """By what the kind of a file is told.

    Attributes:
        format: The entry `format` of a `.safetensors` file's metadata.
        groups: What its weights' names begin with, up to the first dot; the keys of a JSON object.
    """

    format: str | None
    groups: frozenset[str]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns whatever reading a `.safetensors` file raises into an error that names it.

    Raises:
        ValueError: The file is unreadable.
    """
    try:
        yield
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # a broken header can make a reader fail in any way
        raise ValueError(f"{path} is not a readable .safetensors file (truncated download?): {error}") from error


def read_header(path: Path) -> Header:
    """What a `.safetensors` file holds, without reading it.

    Raises:
        ValueError: The file is unreadable.
    """
    with readable(path), safe_open(path, framework="pt") as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        return Header(file.metadata() or {}, tensors)


def read_safetensors(path: Path, names: Iterable[str] | None = None, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file.

    Args:
        names: Those wanted; all if None.
        mapped: Leave them in the file until they are looked at. That keeps it from being replaced on Windows.

    Raises:
        ValueError: The file is unreadable.
    """
    with readable(path), safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
        return found if mapped else {name: tensor.clone() for name, tensor in found.items()}


def read_pickle(path: Path, advice: str, mapped: bool = False) -> Any:
    """The content of a file in PyTorch's own format: tensors and containers.

    Args:
        advice: Ends the message of what is refused: where to get a good file.
        mapped: See `read_safetensors`; where the file allows it.

    Raises:
        ValueError: The file is unreadable or holds code.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # the older pickle format cannot be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            # PyTorch's own words are left out: they advise to load the file without this protection.
            f"{path} was refused: it is truncated, not a PyTorch file, or holds code instead of weights. Nothing in it "
            f"was run. {advice}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle can make the reader fail in any way
        size = f"{path.stat().st_size} bytes" if path.exists() else "a link that leads nowhere"
        reason = (str(error) or type(error).__name__)[:300]
        raise ValueError(
            f"{path} ({size}) is not a readable PyTorch file (truncated download?): {reason}. {advice}"
        ) from error


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        advice: See `read_pickle`.

    Raises:
        ValueError: The file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON (truncated download?): {error}. {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object. {advice}")
    return content


def summary(path: Path) -> Summary | None:
    """Of a `.safetensors` or `.json` file; None for what cannot be read.

    Each is opened once, and again only if it has changed: ComfyUI asks for the choices of every node whenever the
    editor is loaded, and folders may lie on a network share.
    """
    try:
        status = path.stat()
        return _summary(path, status.st_size, status.st_mtime_ns)
    except OSError:  # it may be there again the next time, so it is not remembered
        return None


@lru_cache(maxsize=4096)  # the files not asked for longest are forgotten first
def _summary(path: Path, size: int, changed: int) -> Summary | None:
    try:
        if path.suffix == ".json":
            return Summary(None, frozenset(read_json(path)))
        header = read_header(path)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return None
    return Summary(header.metadata.get("format"), frozenset(name.partition(".")[0] for name in header.tensors))
