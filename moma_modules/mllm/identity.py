"""What tells one MLLM from another: its content, sampled."""

import hashlib
from pathlib import Path

SUFFIXES = (".json", ".model", ".bin", ".safetensors")
SMALL = 4 << 20
"""Files up to this size are hashed whole: the config, the index, the tokenizer."""

SAMPLES, SAMPLE = 64, 16 << 10
"""Larger ones by this many windows of this many bytes, evenly spread, with the first and the last among them."""


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint: a folder's, by name, or the one file itself."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)


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
