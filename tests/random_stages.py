"""The stages of the small world's training before the adapter, with random weights, as they are in 16 bits."""

from pathlib import Path

import numpy as np
import torch
from comfyui_moma.training import diffusion, language, vae
from comfyui_moma.training.latents import SHAPE, Latents


class RandomStages:
    """Autoencoder, text to image and language model; frozen."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae, self.base, self.reader = vae.build().eval(), diffusion.TextToImage().eval(), language.SubjectReader()
        for weight in self.base.unet.parameters():
            if weight.dim() > 1 and not weight.any():  # Some start at 0, and nothing would come through.
                torch.nn.init.normal_(weight, std=0.05)
        for module in (self.vae, self.base, self.reader):
            module.requires_grad_(False)
            module.load_state_dict({key: _rounded(value) for key, value in module.state_dict().items()})


def random_latents(folder: Path, count: int = 20) -> Latents:
    """Latents of so many pictures, by chance: their file in a folder."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, *SHAPE)).astype(np.float16)
    (folder / "latents.f16").write_bytes(values.tobytes())
    (folder / "latents.done").write_text(str(count), "utf-8")
    return Latents(folder / "latents.f16", count)


def _rounded(value: torch.Tensor) -> torch.Tensor:
    return value.half().float() if value.is_floating_point() and value.numel() > 32 else value
