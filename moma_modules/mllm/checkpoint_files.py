"""Which LLaVA checkpoints there are, the files that each consists of, and what tells one from another.

A checkpoint is a folder as published, or one converted file (`convert.py`).
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..download.release import GET_AGAIN
from ..host.weight_files import read_json, summary
from .weights import CONFIG

TOKENIZER = "tokenizer.model"
FORMAT, FORMAT_VERSION = "moma_mllm", "1"
"""What the metadata of a converted file says it is."""

SUFFIXES = (".json", ".model", ".bin", ".safetensors")
MAX_DEPTH = 4
"""How deep below a model folder checkpoints are looked for; enough for a hub snapshot."""


def find_checkpoints(roots: Iterable[Path]) -> dict[str, Path]:
    """LLaVA folders and converted files at or below `roots`, by path relative to their root; the first root wins.

    Links are followed, but not back to a folder they lie in. Hidden folders are left out. Only files that are new or
    have changed are opened.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path = Path(folder)
            if CONFIG in files and _is_llava(path / CONFIG):
                found.setdefault(path.relative_to(root).as_posix() if path != root else root.name, path)
            for file in files:
                if file.endswith(".safetensors") and _is_converted(path / file):
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


def _is_llava(config: Path) -> bool:
    found = summary(config)
    return found is not None and "mm_projector_type" in found.groups


def _is_converted(file: Path) -> bool:
    found = summary(file)
    return found is not None and found.format == FORMAT


def checkpoint_files(path: Path) -> list[Path]:
    """The files a checkpoint consists of: a folder's, by name, or the one file itself."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)


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


INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")
WHOLE_FILES = ("pytorch_model.bin", "model.safetensors")


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that a checkpoint folder should hold, whether they are there or not.

    A folder may hold several forms of the same weights: the first complete one counts, else the first that was begun.

    Raises:
        ValueError: An index is unreadable, or names something else than files of the folder.
    """
    forms = [indexed_files(folder, name) for name in INDEXES if (folder / name).is_file()]
    forms += [[name] for name in WHOLE_FILES if (folder / name).is_file()]
    complete = [names for names in forms if not missing_files(folder, names)]
    return [*complete, *forms, [INDEXES[0]]][0]


def missing_files(folder: Path, names: list[str]) -> list[str]:
    """Those of `names` that are no files of `folder`; a link that leads nowhere is none."""
    return [name for name in names if not (folder / name).is_file()]


def incomplete(folder: Path, missing: list[str]) -> str:
    """The message for files that a folder lacks."""
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    names = f"{', '.join(missing)} {'is ' if len(missing) == 1 else 'are '}missing"
    return f"{folder} is incomplete: {names}. Found: {found}. {GET_AGAIN}"


def indexed_files(folder: Path, index: str) -> list[str]:
    """The weight files of a folder that an index file names.

    Raises:
        ValueError: It is unreadable, or names something else than files of the folder.
    """
    weight_map = read_json(folder / index, GET_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / index} has no weight_map (truncated download?). {GET_AGAIN}")
    for file in weight_map.values():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise ValueError(f"{folder / index} names {file!r}, which is not a file of that folder. {GET_AGAIN}")
    return sorted(set(weight_map.values()))


SMALL = 4 << 20
"""Files up to this size are hashed whole: the config, the index, the tokenizer."""

SAMPLES, SAMPLE = 64, 16 << 10
"""Larger ones by this many windows of this many bytes, evenly spread, with the first and the last among them."""


def checkpoint_identity(path: Path) -> str:
    """A hash that a copy or a move of the checkpoint keeps, and another training of the model does not.

    It reads 1 MiB of each large file instead of all 14 GB: names, sizes and windows spread over the whole length, which
    any retraining, conversion or truncation changes. Weights edited by hand in few places may go unnoticed.
    """
    digest = hashlib.sha256()
    for file in checkpoint_files(path):
        size = file.stat().st_size
        # A single file may be renamed; in a folder, the names say which part is which.
        digest.update(f"{file.name if path.is_dir() else ''}:{size}\n".encode())
        with file.open("rb") as stream:
            if size <= SMALL:
                digest.update(stream.read())
                continue
            for i in range(SAMPLES):
                stream.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
