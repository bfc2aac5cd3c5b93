"""What the reference pass is made of: the pictures through the VAE, the word through CLIP; kept for the next graph."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..subject import Subject
from .reference_cache import content_hash, identity
from .text import encode_word

CAPACITY = 16
"""Pictures and words per loaded adapter; each takes less than a megabyte of CPU memory."""


@dataclass(frozen=True)
class EncodedReference:
    """A subject's references and word, encoded; both on the CPU.

    Attributes:
        latent: [N, 4, h, w] float32, as a VAE gives it (not scaled).
        text: The bare subject word(s) [1, L, context].
    """

    latent: Tensor
    text: Tensor


@dataclass
class _Encodings:
    """Tensors by what was encoded; the longest unused give way. The encoder must be the same object; it may go."""

    _entries: OrderedDict[str, tuple[Callable[[], Any], Tensor]] = field(default_factory=OrderedDict, repr=False)

    def find_or_make(self, content: str, encoder: Any, encode: Callable[[], Tensor]) -> Tensor:
        known = self._entries.get(content)
        if known is None or known[0]() is not encoder:
            known = self._entries[content] = (identity(encoder), encode())
        self._entries.move_to_end(content)
        while len(self._entries) > CAPACITY:
            self._entries.popitem(last=False)
        return known[1]


@dataclass
class EncodedReferences:
    """What went through a VAE or a CLIP. Belongs to a loaded adapter and goes with it."""

    _pictures: _Encodings = field(default_factory=_Encodings, repr=False)
    _words: _Encodings = field(default_factory=_Encodings, repr=False)

    def encode(self, subject: Subject, vae: Any, clip: Any) -> EncodedReference:
        """Encode what this VAE and this CLIP have not encoded yet.

        Args:
            vae: ComfyUI's VAE of an SD1.5 checkpoint.
            clip: Its CLIP.

        Raises:
            ValueError: One of them is not SD1.5's, or the VAE gave NaN.
        """
        return EncodedReference(
            latent=self._pictures.find_or_make(content_hash([subject.images]), vae, lambda: _latent(subject, vae)),
            text=self._words.find_or_make(subject.word, clip, lambda: encode_word(clip, subject.word)),
        )


def _latent(subject: Subject, vae: Any) -> Tensor:
    latent = vae.encode(subject.images.float() / 255).detach().to("cpu", torch.float32)
    if latent.ndim != 4 or latent.shape[1] != 4 or not latent.isfinite().all():
        raise ValueError(
            f"vae gave a latent of shape {tuple(latent.shape)} for the reference picture(s), or NaN. Connect the VAE "
            "of an SD1.5 checkpoint (with NaN: start ComfyUI with --fp32-vae)."
        )
    return latent
