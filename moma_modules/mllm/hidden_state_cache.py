"""Hidden states of the MLLM on disk, so that the same picture, words and model are never computed again."""

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .encode import subject_hidden_state
from .model import Mllm

LIMIT = 1000
"""Hidden states kept, 16 KiB each with the released checkpoint; the ones not used for longest go first."""

_FORMAT = "moma hidden state 2"
"""Part of what names a file. A new number, when the same inputs give another result, leaves the old files unused."""


@dataclass(frozen=True)
class HiddenStateCache:
    """A folder of hidden states, one small `.safetensors` file each, named by what it was computed from."""

    folder: Path

    def hidden_state(self, mllm: Mllm, image: np.ndarray, mask: np.ndarray, subject: str, prompt: str) -> Tensor:
        """As `subject_hidden_state`, but neither computed nor the MLLM loaded where the result is known.

        A file that cannot be read is computed again and replaced; one that cannot be written is a warning. A result
        with NaN is not kept.
        """
        path = self.folder / f"{_key(mllm, image, mask, subject, prompt)}.safetensors"
        hidden = _read(path, mllm.hidden_size)
        if hidden is None:
            hidden = subject_hidden_state(mllm, image, mask, subject, prompt)
            if hidden.isfinite().all():
                self._write(path, hidden)
        return hidden

    def _write(self, path: Path, hidden: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
                file.write(save({"hidden": hidden.contiguous()}, metadata={"format": _FORMAT}))
            os.replace(file.name, path)
            self._prune()
        except OSError as error:
            logging.warning("MoMA could not keep a hidden state in %s: %s", self.folder, error)

    def _prune(self) -> None:
        files = sorted(self.folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for file in files[: max(len(files) - LIMIT, 0)]:
            file.unlink(missing_ok=True)


def _key(mllm: Mllm, image: np.ndarray, mask: np.ndarray, subject: str, prompt: str) -> str:
    """A hash of all that the hidden state depends on.

    The precision is the one chosen at the node, so that `auto` finds its results again when it would choose anew.
    """
    digest = hashlib.sha256(repr((_FORMAT, mllm.identity, mllm.precision, image.shape, subject, prompt)).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    digest.update(np.ascontiguousarray(mask).tobytes())
    return digest.hexdigest()


def _read(path: Path, size: int) -> Tensor | None:
    """The hidden state in a file, marked as used now; None without a sound one."""
    try:
        hidden = load(path.read_bytes()).get("hidden")
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    if hidden is None or hidden.shape != (1, size) or hidden.dtype != torch.float32 or not hidden.isfinite().all():
        return None
    return hidden
