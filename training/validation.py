"""Pictures to look at while an adapter learns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE
from ..moma_modules.prompt.text import encode_prompt
from ..moma_modules.sampling.settings import ImageTokens, Settings
from ..moma_modules.sampling.wrappers import patched
from .drawing import Product
from .vae import save_sheet

STEPS = 15
"""Of the sampler; enough to see what comes."""


@dataclass(frozen=True)
class Question:
    """A reference and what is asked of it.

    Attributes:
        picture: uint8 [S, S, 3].
        mask: bool [S, S].
        strength: Of the shortcut.
        target: A picture that would be right [3, H, W] in -1..1, or None.
    """

    picture: Tensor
    mask: Tensor
    word: str
    prompt: str
    strength: float = 1.0
    target: Tensor | None = None


def answered(
    questions: list[Question],
    hidden: list[Tensor],
    adapter_file: Path,
    model: Any,
    clip: Any,
    vae: Any,
    size: int,
    cfg: float = 7.5,
) -> list[tuple[Tensor, Tensor]]:
    """Pictures [3, size, size] in -1..1 without and with the adapter, from the same noise every time.

    Args:
        hidden: What the MLLM said to each question [1, hidden].
        model, clip, vae: ComfyUI's.
        size: Side of the pictures in pixels.
    """
    product = Product.of(model, clip, vae, adapter_file)
    noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    pictures = []
    with torch.inference_mode():
        for question, state in zip(questions, hidden, strict=True):
            subject = product.subject(state, question.word, question.prompt, question.picture, question.mask)
            parts = {"image_tokens": ImageTokens(), "shortcut": product.shortcut(subject, question.strength, seed=2)}
            with_moma = patched(model, Settings().with_subject(subject, product.adapter, **parts))
            positive = encode_prompt(clip, subject, question.prompt, PROMPT_TEMPLATE).conditioning
            without, drawn = (
                product.pictures(product.samples(used, positive, noise, STEPS, cfg))[0] for used in (model, with_moma)
            )
            pictures.append((without, drawn))
    return pictures


def sheet(path: Path, questions: list[Question], pictures: list[tuple[Tensor, Tensor]]) -> None:
    """One PNG, its rows: references, without the adapter, with it, and what would be right."""
    size = pictures[0][0].shape[-1]
    references = [_fitted(question.picture.movedim(-1, 0).float() / 127.5 - 1, size) for question in questions]
    rows = [torch.stack(references), *(torch.stack(list(row)) for row in zip(*pictures, strict=True))]
    targets = [question.target for question in questions if question.target is not None]
    if len(targets) == len(questions):
        rows.append(torch.stack([_fitted(target, size) for target in targets]))
    save_sheet(path, rows)


def _fitted(picture: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(picture[None], size=(size, size), mode="bilinear", antialias=True)[0]
