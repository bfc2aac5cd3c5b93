"""Pictures to look at while an adapter learns: made by the product itself from the adapter's file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moma_modules.adapter.loading import load_adapter
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE
from ..moma_modules.prompt.text import encode_prompt
from ..moma_modules.sampling.reference import encode_reference
from ..moma_modules.sampling.settings import ImageTokens, Settings, Shortcut
from ..moma_modules.sampling.wrappers import patched
from ..moma_modules.subject.subject import Subject
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
    import comfy.sample

    adapter = load_adapter(adapter_file)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, size // 8, size // 8, generator=generator)
    pictures = []
    with torch.inference_mode():
        negative = [[clip.encode_from_tokens(clip.tokenize("")), {}]]
        for question, state in zip(questions, hidden, strict=True):
            subject = Subject(
                adapter.map_hidden_state(state),
                question.word,
                question.prompt,
                question.picture[None],
                question.mask[None],
                adapter.identity,
            )
            encoded = encode_reference(adapter, subject, vae, clip)
            reference_noise = torch.randn(encoded.latent.shape, generator=generator.manual_seed(2))
            shortcut = Shortcut(encoded.latent, encoded.text, reference_noise, question.strength)
            settings = Settings().with_subject(subject, adapter, image_tokens=ImageTokens(), shortcut=shortcut)
            positive = encode_prompt(clip, subject, question.prompt, PROMPT_TEMPLATE).conditioning
            both = []
            for used in (model, patched(model, settings)):
                samples = comfy.sample.sample(
                    used,
                    noise,
                    STEPS,
                    cfg,
                    "ddim",
                    "ddim_uniform",
                    positive,
                    negative,
                    torch.zeros_like(noise),
                    seed=1,
                    disable_pbar=True,
                )
                both.append(vae.decode(samples)[0].movedim(-1, 0).float().cpu().clone() * 2 - 1)
            pictures.append((both[0], both[1]))
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
