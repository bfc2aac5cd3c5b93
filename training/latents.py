"""The latents of the training pictures, encoded once by the frozen encoder and kept in a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .data import Pictures

SHAPE = (4, 16, 16)
SPREAD = 1.6
"""Standard deviation of what the UNet sees. Above 1, as small latents lose their signal early on SD1.5's schedule."""
_BATCH = 64


class Latents:
    """Latents of pictures 0 to N-1, scaled to `SPREAD`; float16 in a file, encoded as far as it goes."""

    def __init__(self, file: Path, count: int, scale: float | None = None) -> None:
        """Open the file for so many pictures, or make it.

        Args:
            scale: What the encoder's latents are multiplied by; measured where None.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._done_file = file.with_suffix(".done")
        self._values = np.memmap(file, np.float16, "r+" if file.is_file() else "w+", shape=(count, *SHAPE))
        done = int(self._done_file.read_text("utf-8")) if self._done_file.is_file() else 0
        self._done = min(done, count)  # fewer pictures may be wanted now
        self._scale = scale

    def __len__(self) -> int:
        """How many there are."""
        return self._done

    @torch.no_grad()
    def encode(self, vae: Any, device: torch.device) -> None:
        """Encode what is missing."""
        total = len(self._values)
        source: IterableDataset[Tensor] = Pictures(self._done)
        for pictures in DataLoader(source, batch_size=_BATCH):
            if self._done >= total:
                break
            found = _encoded(pictures, vae, device).cpu().half().numpy()
            end = min(self._done + _BATCH, total)
            self._values[self._done : end] = found[: end - self._done]
            self._done = end
            if end % (32 * _BATCH) == 0 or end == total:
                self._values.flush()
                self._done_file.write_text(str(end), "utf-8")
                print(f"latents: {end:,} of {total:,}", flush=True)

    @property
    def scale(self) -> float:
        """What the encoder's latents are multiplied by."""
        if self._scale is None:
            self._scale = SPREAD / float(self._values[: min(self._done, 4096)].astype(np.float32).std())
        return self._scale

    def take(self, numbers: Tensor) -> Tensor:
        """Scaled latents [N, 4, 16, 16] of these pictures."""
        return torch.from_numpy(self._values[numbers.numpy()].astype(np.float32)) * self.scale

    @torch.no_grad()
    def encoded(self, pictures: Tensor, vae: Any, device: torch.device) -> Tensor:
        """Scaled latents of pictures [N, 3, H, W] that are not among these."""
        return _encoded(pictures, vae, device) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """Scaled latents as the decoder takes them."""
        return latents / self.scale


def _encoded(pictures: Tensor, vae: Any, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        return vae.encode(pictures.to(device, memory_format=torch.channels_last)).float()
