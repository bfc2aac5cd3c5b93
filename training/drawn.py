"""Pictures of subjects by the product and the small world's files, and what a probe reads in them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ..moma_modules.adapter.loading import load_adapter
from ..moma_modules.mini.checkpoint import load_mini_checkpoint
from ..moma_modules.mllm.encode import subject_hidden_state
from ..moma_modules.mllm.loading import load_mllm
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE, fill_template
from ..moma_modules.prompt.text import encode_prompt
from ..moma_modules.sampling.reference import encode_reference
from ..moma_modules.sampling.settings import ImageTokens, Settings, Shortcut
from ..moma_modules.sampling.wrappers import patched
from ..moma_modules.subject.subject import Subject as MomaSubject
from .data import to_tensor
from .description import NAMED
from .export import ADAPTER, CHECKPOINT, MLLM
from .painter import paint
from .probe import Probe, Reading
from .words import MATERIAL_WORDS, PLACE_WORDS, SYNONYMS
from .world import CLASSES, SIDE, Subject, draw_scene, draw_subject

STEPS, CFG = 20, 4.0


@dataclass(frozen=True)
class Variant:
    """What of MoMA is at work.

    Attributes:
        plain: Nothing of it: the prompt alone.
        mask: Whether the conditioning says where the subject's tokens are, without which there is no mask.
        told: Whether the language model is shown the prompt, or only the word.
        strength: Of the shortcut.
    """

    plain: bool = False
    image_tokens: bool = True
    shortcut: bool = True
    mask: bool = True
    told: bool = True
    strength: float = 1.0


@dataclass(frozen=True)
class Read:
    """What a probe reads in one picture, held against what was asked for; see `quality.Row`."""

    found: bool
    aimed: bool
    kind: bool
    overlap: float | None


def measured_subjects(count: int) -> list[Subject]:
    """Subjects that training never sees, of all classes in turn."""
    return [
        draw_subject(random.Random(f"measured {i}"), CLASSES[i % len(CLASSES)], held_out=True) for i in range(count)
    ]


class SmallWorld:
    """The files at work on a number of subjects."""

    def __init__(self, files: Path, probe: Probe, subjects: list[Subject], seeds: int) -> None:
        """Load the files and paint the references.

        Args:
            seeds: Pictures of each prompt.
        """
        self._model, self._clip, self._vae = load_mini_checkpoint(files / CHECKPOINT)
        self._mllm = load_mllm(files / MLLM, "fp32")
        self._adapter = load_adapter(files / ADAPTER)
        self._probe, self._subjects = probe, subjects
        scenes = [draw_scene(random.Random(f"reference {i}"), subject, None) for i, subject in enumerate(subjects)]
        self._references = [paint(scene) for scene in scenes]
        shown = torch.stack([to_tensor(picture) for picture, _ in self._references])
        with torch.no_grad():
            self._looks = looks(probe(shown))
        noise = [torch.randn(4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(i)) for i in range(seeds)]
        self._noise = torch.stack(noise)

    @torch.inference_mode()
    def draw(self, number: int, place: str | None, material: str | None, variant: Variant) -> list[Read]:
        """Pictures of a subject in a place or of a material, one for each seed, and what is read in them."""
        subject = self._subjects[number]
        word = SYNONYMS[subject.name][0]
        made = f" {MATERIAL_WORDS[material][0]}" if material else ""
        where = f" {PLACE_WORDS[place][0]}" if place else ""
        prompt = f"A {word}{made}{where}."
        picture, mask = self._references[number]
        hidden = subject_hidden_state(self._mllm, picture, mask, word, prompt if variant.told else f"A {word}.")
        moma = MomaSubject(
            self._adapter.map_hidden_state(hidden),
            word,
            prompt,
            torch.from_numpy(picture.copy())[None],
            torch.from_numpy(mask.copy())[None],
            self._adapter.identity,
        )
        marked = encode_prompt(self._clip, moma, prompt, PROMPT_TEMPLATE).conditioning
        bare = self._encoded(fill_template(PROMPT_TEMPLATE, word, prompt))
        model = self._model if variant.plain else self._patched(moma, variant)
        samples = comfy.sample.sample(
            model,
            self._noise,
            STEPS,
            CFG,
            "ddim",
            "ddim_uniform",
            marked if variant.mask and not variant.plain else bare,
            self._encoded(""),
            torch.zeros_like(self._noise),
            seed=1,
            disable_pbar=True,
        )
        decoded = self._vae.decode(samples).movedim(-1, 1).float().cpu() * 2 - 1
        run = None if variant.plain or not variant.mask else moma.runs.find(samples)
        masks = None if run is None else run.masks[moma.key].float().cpu()
        return self._read(number, self._probe(decoded), masks, place, material)

    def _patched(self, subject: MomaSubject, variant: Variant) -> Any:
        parts: dict[str, Any] = {}
        if variant.image_tokens:
            parts["image_tokens"] = ImageTokens()
        if variant.shortcut:
            encoded = encode_reference(self._adapter, subject, self._vae, self._clip)
            noise = torch.randn(encoded.latent.shape, generator=torch.Generator().manual_seed(0))
            parts["shortcut"] = Shortcut(encoded.latent, encoded.text, noise, variant.strength)
        return patched(self._model, Settings().with_subject(subject, self._adapter, **parts))

    def _encoded(self, text: str) -> list[Any]:
        return [[self._clip.encode_from_tokens(self._clip.tokenize(text)), {}]]

    def _read(
        self, number: int, reading: Reading, masks: Tensor | None, place: str | None, material: str | None
    ) -> list[Read]:
        nearest = torch.cdist(looks(reading), self._looks).argmin(dim=1)
        named = {name: logits.argmax(dim=1) for name, logits in reading.named.items()}
        aim, wanted = ("material", material) if material else ("place", place)
        kind = NAMED["class"].index(self._subjects[number].name)
        found = []
        for i in range(len(nearest)):
            overlap = None
            if masks is not None:
                here, seen = masks[i] > 0.5, reading.masks[i] > 0
                overlap = float((here & seen).sum() / (here | seen).sum().clamp(min=1))
            found.append(
                Read(
                    found=int(nearest[i]) == number,
                    aimed=NAMED[aim][int(named[aim][i])] == wanted,
                    kind=int(named["class"][i]) == kind,
                    overlap=overlap,
                )
            )
        return found


def looks(reading: Reading) -> Tensor:
    """What tells subjects apart, as vectors [B, N] whose distance says how alike they are."""
    shares = [reading.named[name].softmax(dim=1) for name in ("class", "pattern")]
    colours, shape, count = reading.numbers.split((9, 2, 1), dim=1)
    return torch.cat([*shares, colours.clamp(-1, 1), 0.5 * shape, 0.25 * count], dim=1)
