"""What is measured: SD1.5 with random weights, an adapter, subjects and prompts, and MODELs made from them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.random_weights import EMBEDDING, HIDDEN, SD15
from workbench.tiny_models import TINY, adapter_groups, seeded, tiny_model

TEXT_LENGTH = 77
WORD = "car"
PICTURE = 512
"""Side of the reference picture."""


@dataclass(frozen=True)
class Workload:
    """A loaded model and adapter.

    Attributes:
        model: A MODEL without MoMA.
        adapter: Fits the model.
        unet: Channels per level and context size, as in `tiny_models.TINY`.
        reference: Side of the reference's latent: 64, or 8 with the tiny model.
    """

    model: Any
    adapter: Any
    unet: dict[str, Any]
    reference: int

    @property
    def context_size(self) -> int:
        """Size of a text token's embedding."""
        return int(self.unet["cross_attention_dim"])


@dataclass(frozen=True)
class Scene:
    """What a run shows.

    Attributes:
        mask: Part of the reference picture that the subject takes, 0..1.
        references: Pictures per subject.
        subjects: Subjects in the picture.
        seed: Other seeds, other subjects.
        share: Part of the new picture that a region mask keeps the subject's shortcut to, 0..1; None: all of it.
    """

    mask: float = 0.25
    references: int = 1
    subjects: int = 1
    seed: int = 0
    share: float | None = None


def load_workload(tiny: bool, dtype: torch.dtype) -> Workload:
    """SD1.5 at full size, or the tests' tiny model, with random weights.

    Args:
        dtype: Of the UNet's weights and arithmetic.
    """
    unet = TINY if tiny else SD15
    return Workload(tiny_model(unet, dtype), random_adapter(unet), unet, 8 if tiny else PICTURE // 8)


def random_adapter(unet: dict[str, Any]) -> Any:
    """An adapter for a UNet of these sizes, stored in fp16 as published."""
    from comfyui_moma.moma_modules.adapter.loading import load_adapter

    groups = adapter_groups(unet, embedding=EMBEDDING, hidden=HIDDEN)
    halves = {name: {key: value.half() for key, value in group.items()} for name, group in groups.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attn_adapters_projectors.th"
        torch.save(halves, path)
        return load_adapter(path)


def subjects(workload: Workload, scene: Scene) -> list[Any]:
    """The subjects of a scene, each in the middle of its reference pictures."""
    from comfyui_moma.moma_modules.subject.subject import Subject

    mask = square(scene.mask) > 0
    found = []
    for number in range(scene.seed, scene.seed + scene.subjects):
        pictures = [
            (seeded(number, f"picture {i}", (PICTURE, PICTURE, 3)).clamp(-1, 1) * 127 + 128).to(torch.uint8)
            for i in range(scene.references)
        ]
        embedding = seeded(number, "embedding", (1, workload.adapter.sizes.embedding))
        images, masks = torch.stack(pictures), torch.stack([mask] * scene.references)
        found.append(Subject(embedding, WORD, f"A {WORD}.", images, masks, workload.adapter.identity))
    return found


def square(part: float) -> torch.Tensor:
    """1 in a square in the middle that is this part of a picture [PICTURE, PICTURE], else 0."""
    found = torch.zeros(PICTURE, PICTURE)
    half = round(PICTURE * part**0.5 / 2)
    middle = slice(PICTURE // 2 - half, PICTURE // 2 + half)
    found[middle, middle] = 1
    return found


def shortcut(workload: Workload, scene: Scene) -> Any:
    """A Shortcut over the latents of the scene's reference pictures."""
    from comfyui_moma.moma_modules.sampling.settings import Shortcut, Window

    shape = (scene.references, 4, workload.reference, workload.reference)
    return Shortcut(
        latent=seeded(6, "latent", shape),
        text=seeded(6, "text", (1, TEXT_LENGTH, workload.context_size)),
        noise=seeded(6, "noise", shape),
        window=Window(start=0.05, region=None if scene.share is None else square(scene.share)[None]),
    )


def moma_model(workload: Workload, scene: Scene, apply: bool = True, with_shortcut: bool = True) -> Any:
    """The workload's model with MoMA on it."""
    from workbench.scene import moma

    model = workload.model
    for subject in subjects(workload, scene):
        part = shortcut(workload, scene) if with_shortcut else None
        model = moma(model, workload.adapter, subject, weight=1.0 if apply else None, shortcut=part)
    return model


def prompts(workload: Workload, scene: Scene) -> tuple[list, list]:
    """A positive CONDITIONING that knows where each subject's tokens are, and a negative one that knows nothing."""
    from comfyui_moma.moma_modules.prompt.marks import mark_tokens

    shape = (1, TEXT_LENGTH, workload.context_size)
    places = {subject.key: (4 + 3 * number,) for number, subject in enumerate(subjects(workload, scene))}
    return mark_tokens([[seeded(7, "positive", shape), {}]], places), [[seeded(8, "negative", shape), {}]]
