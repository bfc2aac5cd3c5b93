"""Pictures made by the product itself from an adapter's file: what training shows and what is measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ..moma_modules.adapter.loading import Adapter, load_adapter
from ..moma_modules.sampling.reference import encode_reference
from ..moma_modules.sampling.settings import Shortcut
from ..moma_modules.subject.subject import Subject


@dataclass(frozen=True)
class Product:
    """What a graph loads.

    Attributes:
        model, clip, vae: ComfyUI's, of an SD1.5 checkpoint.
        adapter: Of MoMA.
    """

    model: Any
    clip: Any
    vae: Any
    adapter: Adapter

    @classmethod
    def of(cls, model: Any, clip: Any, vae: Any, adapter_file: Path) -> "Product":
        """A loaded checkpoint with an adapter's file."""
        return cls(model, clip, vae, load_adapter(adapter_file))

    def subject(self, hidden: Tensor, word: str, prompt: str, picture: Tensor, mask: Tensor) -> Subject:
        """A subject.

        Args:
            hidden: What the MLLM said [1, hidden].
            picture: uint8 [S, S, 3].
            mask: bool [S, S].
        """
        embedding = self.adapter.map_hidden_state(hidden)
        return Subject(embedding, word, prompt, picture[None], mask[None], self.adapter.identity)

    def shortcut(self, subject: Subject, strength: float, seed: int = 0) -> Shortcut:
        """The subject's shortcut as the node makes it."""
        encoded = encode_reference(self.adapter, subject, self.vae, self.clip)
        noise = torch.randn(encoded.latent.shape, generator=torch.Generator().manual_seed(seed))
        return Shortcut(encoded.latent, encoded.text, noise, strength)

    def encoded(self, text: str) -> list[Any]:
        """A conditioning as Clip Text Encode gives it."""
        return [[self.clip.encode_from_tokens(self.clip.tokenize(text)), {}]]

    def samples(self, model: Any, positive: list[Any], noise: Tensor, steps: int, cfg: float) -> Tensor:
        """Latents by DDIM from noise [B, 4, h, w], with nothing as the negative prompt.

        Args:
            model: The product's own, or a patched clone of it.
        """
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "ddim",
            "ddim_uniform",
            positive,
            self.encoded(""),
            torch.zeros_like(noise),
            seed=1,
            disable_pbar=True,
        )

    def pictures(self, samples: Tensor) -> Tensor:
        """Latents as pictures [B, 3, H, W] in -1..1."""
        return self.vae.decode(samples).movedim(-1, 1).float().cpu().clone() * 2 - 1
