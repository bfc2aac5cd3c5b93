"""What the reference pass is made of: the pictures through the VAE, the word through CLIP; kept for the next graph."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..subject import Subject
from .kept import Kept, content_hash
from .text import encode_word

CAPACITY = 16 * 2**20
"""Bytes of CPU memory for each of pictures and words, per loaded adapter. One reference takes 64 kB."""


@dataclass(frozen=True)
class EncodedReference:
    """A subject's references and word, encoded; both on the CPU.

    Attributes:
        latent: [N, 4, h, w] float32, as a VAE gives it (not scaled).
        text: The bare subject word(s) [1, L, context].
    """

    latent: Tensor
    text: Tensor


def _encodings() -> Kept[Tensor]:
    return Kept(lambda tensor: tensor.nbytes, CAPACITY)


@dataclass
class EncodedReferences:
    """What went through a VAE or a CLIP, as long as they are the same objects. Belongs to a loaded adapter."""

    pictures: Kept[Tensor] = field(default_factory=_encodings)
    words: Kept[Tensor] = field(default_factory=_encodings)

    def encode(self, subject: Subject, vae: Any, clip: Any) -> EncodedReference:
        """Encode what this VAE and this CLIP have not encoded yet.

        Args:
            vae: ComfyUI's VAE of an SD1.5 checkpoint.
            clip: Its CLIP.

        Raises:
            ValueError: One of them is not SD1.5's, or the VAE gave NaN.
        """
        pictures = content_hash([subject.images])
        latent = self.pictures.find(pictures, (vae,))
        if latent is None:
            latent = _latent(subject, vae)
            self.pictures.keep(pictures, (vae,), latent)
        text = self.words.find(subject.word, (clip,))
        if text is None:
            text = encode_word(clip, subject.word)
            self.words.keep(subject.word, (clip,), text)
        return EncodedReference(latent, text)


def _latent(subject: Subject, vae: Any) -> Tensor:
    latent = vae.encode(subject.images.float() / 255).detach().to("cpu", torch.float32)
    if latent.ndim != 4 or latent.shape[1] != 4 or not latent.isfinite().all():
        raise ValueError(
            f"vae gave a latent of shape {tuple(latent.shape)} for the reference picture(s), or NaN. Connect the VAE "
            "of an SD1.5 checkpoint (with NaN: start ComfyUI with --fp32-vae)."
        )
    return latent
