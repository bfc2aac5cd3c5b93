"""Named weights from `.bin` and `.safetensors` files, whole or in shards. No code in a file is run."""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..release import GET_AGAIN

INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")
WHOLE_FILES = ("pytorch_model.bin", "model.safetensors")

Reader = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
"""Gives tensors and metadata of a weight file, or raises a ValueError that names it."""


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that a checkpoint folder should hold, whether they are there or not.

    A folder may hold several forms of the same weights: the first complete one counts, else the first that was begun.

    Raises:
        ValueError: An index is unreadable, or names something else than files of the folder.
    """
    forms = [_indexed(folder, name) for name in INDEXES if (folder / name).is_file()]
    forms += [[name] for name in WHOLE_FILES if (folder / name).is_file()]
    complete = [names for names in forms if not missing_files(folder, names)]
    return [*complete, *forms, [INDEXES[0]]][0]


def missing_files(folder: Path, names: list[str]) -> list[str]:
    """Those of `names` that are no files of `folder`; a link that leads nowhere is none."""
    return [name for name in names if not (folder / name).is_file()]


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
        if index.is_file() and _indexed(folder, index.name) == names:
            lost = sorted(set(read_json(index)["weight_map"]) - set(tensors))
            if lost:
                raise ValueError(f"{index} lists the weight {lost[0]!r}, which none of its files holds. {GET_AGAIN}")
    return tensors


def read_mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file, `.safetensors` or in PyTorch's own format: a `Reader` without ComfyUI.

    Raises:
        ValueError: The file is unreadable, holds code, or is no file of named weights.
    """
    if path.suffix != ".safetensors":
        return read_pickle(path), {}
    with readable(path), safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: The file is missing, unreadable or holds something else.
    """
    if not path.is_file():
        raise ValueError(incomplete(path.parent, [path.name]))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON (truncated download?): {error}. {GET_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object. {GET_AGAIN}")
    return content


def incomplete(folder: Path, missing: list[str]) -> str:
    """The message for files that a folder lacks."""
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    names = f"{', '.join(missing)} {'is ' if len(missing) == 1 else 'are '}missing"
    return f"{folder} is incomplete: {names}. Found: {found}. {GET_AGAIN}"


def _indexed(folder: Path, name: str) -> list[str]:
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / name} has no weight_map (truncated download?). {GET_AGAIN}")
    for file in weight_map.values():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise ValueError(f"{folder / name} names {file!r}, which is not a file of that folder. {GET_AGAIN}")
    return sorted(set(weight_map.values()))


def read_pickle(path: Path, mmap: bool = True) -> dict[str, Tensor]:
    """Named weights from a file in PyTorch's own format.

    Args:
        mmap: Map the tensors instead of reading them, where the file allows it.

    Raises:
        ValueError: The file is unreadable, holds code, or is no file of named weights.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # the older pickle format cannot be memory-mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            # PyTorch's own words are left out: they advise to load the file without this protection.
            f"{path} was refused: it is truncated, not a PyTorch file, or holds code instead of weights. {GET_AGAIN}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle can make the reader fail in any way
        size = f"{path.stat().st_size} bytes" if path.exists() else "a link that leads nowhere"
        raise ValueError(
            f"{path} ({size}) is not a readable PyTorch file (truncated download?): {error}. {GET_AGAIN}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold named weights. {GET_AGAIN}")
    return content
