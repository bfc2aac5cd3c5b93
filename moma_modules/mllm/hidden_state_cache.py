"""Hidden states of the MLLM on disk, so that the same picture, words and model are never computed again."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..host.disk import content_hash, written_whole
from ..host.messages import warn
from ..host.weight_files import read_safetensors
from .encode import subject_hidden_states
from .loading import Mllm

HIDDEN_STATES = "hidden_states"
"""What the folder of them is called."""

LIMIT = 1000
"""Hidden states kept, 16 KiB each with the released checkpoint; the ones not used for longest go first."""

_FORMAT = "moma hidden state 2"
"""Part of what names a file. A new number, when the same inputs give another result, leaves the old files unused."""


@dataclass(frozen=True)
class HiddenStateCache:
    """A folder of hidden states, one small `.safetensors` file each, named by what it was computed from."""

    folder: Path

    def hidden_states(
        self, mllm: Mllm, image: np.ndarray, mask: np.ndarray, texts: Sequence[tuple[str, str]]
    ) -> list[Tensor]:
        """As `subject_hidden_states`, but computed only where the result is not known, and loaded only for that.

        Each is kept as soon as it is there, so a Cancel loses none that was. A file that cannot be read is computed
        again and replaced; one that cannot be written is a warning. A result with NaN is not kept.
        """
        paths = {text: self.folder / f"{_key(mllm, image, mask, *text)}.safetensors" for text in texts}
        found = {text: _read(path, mllm.hidden_size) for text, path in paths.items()}
        known = {text: hidden for text, hidden in found.items() if hidden is not None}
        missing = [text for text in paths if text not in known]
        if missing:
            for text, hidden in zip(missing, subject_hidden_states(mllm, image, mask, missing), strict=True):
                known[text] = hidden
                if hidden.isfinite().all():
                    self._write(paths[text], hidden)
        return [known[text] for text in texts]

    def _write(self, path: Path, hidden: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                partial.write_bytes(save({"hidden": hidden.contiguous()}, {"format": _FORMAT}))
            self._prune()
        except OSError as error:
            warn(f"MoMA could not keep a hidden state in {self.folder}: {error}")

    def _prune(self) -> None:
        used = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another server has just made a whole file of this part
                used.append((file.stat().st_mtime_ns, file))
        for _, file in sorted(used)[: max(len(used) - LIMIT, 0)]:
            file.unlink(missing_ok=True)


def _key(mllm: Mllm, image: np.ndarray, mask: np.ndarray, subject: str, prompt: str) -> str:
    """A hash of all that the hidden state depends on.

    The precision is the one chosen at the node, so that `auto` finds its results again when it would choose anew.
    """
    given = repr((_FORMAT, mllm.identity, mllm.precision, image.shape, subject, prompt))
    return content_hash(given, image.tobytes(), mask.tobytes())


def _read(path: Path, size: int) -> Tensor | None:
    """The hidden state in a file, marked as used now; None without a sound one."""
    try:
        hidden = read_safetensors(path).get("hidden")
        os.utime(path)
    except (OSError, ValueError):
        return None
    if hidden is None or hidden.shape != (1, size) or hidden.dtype != torch.float32 or not hidden.isfinite().all():
        return None
    return hidden
