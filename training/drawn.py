"""Pictures of subjects by the product and the small world's files, and what a probe reads in them."""

import functools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from workbench.small_world import ADAPTER, CFG, CHECKPOINT, MLLM, STEPS

from ..moma_modules.mini.checkpoint import load_mini_checkpoint
from ..moma_modules.mllm.encode import subject_hidden_state
from ..moma_modules.mllm.loading import load_mllm
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE, fill_template
from ..moma_modules.prompt.text import encode_prompt
from ..moma_modules.sampling.settings import ImageTokens, Settings, Window
from ..moma_modules.sampling.wrappers import patched
from ..moma_modules.subject.subject import Subject as MomaSubject
from ..moma_modules.subject.subject import combine_subjects
from .data import to_tensor
from .description import COLOURS, COUNT, NAMED, SHAPE
from .drawing import Product
from .painter import paint
from .probe import MASK_SIDE, Probe, Reading, load
from .words import MATERIAL_WORDS, PLACE_WORDS, SYNONYMS
from .world import CLASSES, SIDE, Subject, draw_scene, draw_subject


@dataclass(frozen=True)
class Variant:
    """What of MoMA is at work.

    Attributes:
        plain: Nothing of it: the prompt alone.
        mask: Whether the conditioning says where the subject's tokens are, without which there is no mask.
        told: Whether the language model is shown the prompt, or only the word.
        said: Whether the text encoder is.
        strength: Of the shortcut.
        weight: Of the image tokens.
        cfg: Of the sampler.
        references: How many pictures of the subject are combined.
        region: Whether a region mask keeps the subject to the middle of the picture.
        second: Whether the next subject is attached too, kept to a corner of the picture where nothing is asked for.
        shape: Of the subject, in place of its own.
    """

    plain: bool = False
    image_tokens: bool = True
    shortcut: bool = True
    mask: bool = True
    told: bool = True
    said: bool = True
    strength: float = 1.0
    weight: float = 1.0
    cfg: float = CFG
    references: int = 1
    region: bool = False
    second: bool = False
    shape: tuple[float, float] | None = None


@dataclass(frozen=True)
class Asked:
    """A subject by its number, the place or the material it is asked for in, and with what of MoMA."""

    number: int
    place: str | None
    material: str | None
    variant: Variant = Variant()


@dataclass(frozen=True)
class Read:
    """What a probe reads in one picture, held against what was asked for; see `quality.Row`.

    Attributes:
        distance: To the subject's own reference, see `looks`.
        sure: The share that the probe gives to all that was asked for together, 0..1: the class with the place or
            the material.
        shape: Mean error of the two numbers of the subject's shape.
        shapes: These two as the probe reads them, 0..1; a little beyond is possible.
    """

    found: bool
    distance: float
    aimed: bool
    sure: float
    kind: bool
    shape: float
    shapes: tuple[float, float]
    overlap: float | None


def measured_subjects(count: int) -> list[Subject]:
    """Subjects that training never sees, of all classes in turn."""
    return [
        draw_subject(random.Random(f"measured {i}"), CLASSES[i % len(CLASSES)], held_out=True) for i in range(count)
    ]


def drawer(files: Path, subjects: int, seeds: int) -> Callable[[Asked], tuple[Tensor, list[Read]]]:
    """What draws so many of the measured subjects, for `SideBySide`."""
    logging.getLogger("comfyui_moma").setLevel(logging.ERROR)  # It warns where there is no mask, which is meant here.
    return SmallWorld(files, load(), measured_subjects(subjects), seeds).draw


class SmallWorld:
    """The files at work on a number of subjects."""

    def __init__(self, files: Path, probe: Probe, subjects: list[Subject], seeds: int) -> None:
        """Load the files and paint the references.

        Args:
            seeds: Pictures of each prompt.
        """
        model, clip, vae = load_mini_checkpoint(files / CHECKPOINT)
        self._product = Product.of(model, clip, vae, files / ADAPTER)
        self._mllm = load_mllm(files / MLLM, "fp32")
        self._probe, self._subjects = probe, subjects
        shown = torch.stack([to_tensor(self._reference(i)[0]) for i in range(len(subjects))])
        with torch.no_grad():
            self._looks = looks(probe(shown))
        noise = [torch.randn(4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(i)) for i in range(seeds)]
        self._noise = torch.stack(noise)

    @torch.inference_mode()
    def draw(self, asked: Asked) -> tuple[Tensor, list[Read]]:
        """Pictures of a subject in a place or of a material, one for each seed, and what is read in them.

        Returns:
            [seeds, 3, SIDE, SIDE] in -1..1, and a reading of each.
        """
        number, place, material, variant = asked.number, asked.place, asked.material, asked.variant
        word = SYNONYMS[self._subjects[number].name][0]
        prompt = self.prompt(number, place, material)
        moma = functools.reduce(
            combine_subjects, (self._subject(number, word, prompt, variant, i) for i in range(variant.references))
        )
        product = self._product
        said = prompt if variant.said else _bare(word)
        if variant.mask and not variant.plain:
            positive = encode_prompt(product.clip, moma, said, PROMPT_TEMPLATE).conditioning
        else:
            positive = product.encoded(fill_template(PROMPT_TEMPLATE, word, said))
        settings = Settings() if variant.plain else self._with(Settings(), moma, variant, _MIDDLE)
        if variant.second:
            other = (number + 1) % len(self._subjects)
            word = SYNONYMS[self._subjects[other].name][0]
            second = self._subject(other, word, self.prompt(other, place, None), variant, 0)
            settings = self._with(settings, second, replace(variant, region=True), _CORNER)
        model = product.model if variant.plain else patched(product.model, settings)
        samples = product.samples(model, positive, self._noise, STEPS, variant.cfg)
        pictures = product.pictures(samples)
        run = None if variant.plain or not variant.mask else moma.runs.find(samples)
        masks = None if run is None else run.masks[moma.key].float().cpu()
        return pictures, self._read(asked, self._probe(pictures), masks)

    def painted(self, asked: Asked) -> list[Read]:
        """What is read in pictures of the painter's own, one for each seed: the best that drawn ones can come to."""
        number, place, material = asked.number, asked.place, asked.material
        shown = (self._thing(number, asked.variant), place, material)
        scenes = [paint(draw_scene(random.Random(f"painted {number} {i}"), *shown)) for i in range(len(self._noise))]
        covered = torch.stack([torch.from_numpy(mask.copy()).float() for _, mask in scenes])
        masks = avg_pool2d(covered, SIDE // MASK_SIDE)
        with torch.inference_mode():
            reading = self._probe(torch.stack([to_tensor(picture) for picture, _ in scenes]))
        return self._read(asked, reading, masks)

    def prompt(self, number: int, place: str | None, material: str | None) -> str:
        """What asks for a subject in a place or of a material."""
        made = f" {MATERIAL_WORDS[material][0]}" if material else ""
        where = f" {PLACE_WORDS[place][0]}" if place else ""
        return f"A {SYNONYMS[self._subjects[number].name][0]}{made}{where}."

    def shape(self, number: int) -> tuple[float, float]:
        """A subject's own shape."""
        return self._subjects[number].shape

    def reference(self, number: int, variant: Variant | None = None) -> Tensor:
        """A subject's first reference [3, SIDE, SIDE] in -1..1, with the shape that the variant gives it."""
        return to_tensor(self._reference(number, variant=variant)[0])

    def shown(self, number: int) -> tuple[Tensor, Tensor]:
        """A subject's first reference, and its mask [SIDE, SIDE]."""
        picture, mask = self._reference(number)
        return to_tensor(picture), torch.from_numpy(mask.copy())

    def _reference(self, number: int, view: int = 0, variant: Variant | None = None) -> tuple[Any, Any]:
        rng = random.Random(f"reference {number}" if not view else f"reference {number} {view}")
        return paint(draw_scene(rng, self._thing(number, variant), None))

    def _thing(self, number: int, variant: Variant | None) -> Subject:
        subject = self._subjects[number]
        return replace(subject, shape=variant.shape) if variant and variant.shape else subject

    def _subject(self, number: int, word: str, prompt: str, variant: Variant, view: int) -> MomaSubject:
        picture, mask = self._reference(number, view, variant)
        hidden = subject_hidden_state(self._mllm, picture, mask, word, prompt if variant.told else _bare(word))
        shown = (torch.from_numpy(part.copy()) for part in (picture, mask))
        return self._product.subject(hidden, word, prompt, *shown)

    def _with(self, settings: Settings, subject: MomaSubject, variant: Variant, region: Tensor) -> Settings:
        window = Window(region=region if variant.region else None)
        parts: dict[str, Any] = {}
        if variant.image_tokens:
            parts["image_tokens"] = ImageTokens(variant.weight, window)
        if variant.shortcut:
            shortcut = self._product.shortcut(subject, variant.strength)
            parts["shortcut"] = replace(shortcut, window=replace(window, start=shortcut.window.start))
        return settings.with_subject(subject, self._product.adapter, **parts)

    def _read(self, asked: Asked, reading: Reading, masks: Tensor | None) -> list[Read]:
        number, subject = asked.number, self._thing(asked.number, asked.variant)
        distances = torch.cdist(looks(reading), self._looks)
        named = {name: logits.argmax(dim=1) for name, logits in reading.named.items()}
        aim = "material" if asked.material else "place"
        wanted = {"class": subject.name, aim: asked.material or asked.place}
        at = {name: NAMED[name].index(value) for name, value in wanted.items()}
        sure = torch.stack([reading.named[name].softmax(dim=1)[:, i] for name, i in at.items()]).prod(dim=0)
        shapes = (reading.numbers[:, SHAPE] + 1) / 2
        errors = (shapes - torch.tensor(subject.shape)).abs().mean(dim=1)
        found = []
        for i, from_all in enumerate(distances):
            overlap = None
            if masks is not None:
                here, seen = masks[i] > 0.5, reading.masks[i] > 0
                overlap = float((here & seen).sum() / (here | seen).sum().clamp(min=1))
            found.append(
                Read(
                    found=int(from_all.argmin()) == number,
                    distance=float(from_all[number]),
                    aimed=int(named[aim][i]) == at[aim],
                    sure=float(sure[i]),
                    kind=int(named["class"][i]) == at["class"],
                    shape=float(errors[i]),
                    shapes=(float(shapes[i][0]), float(shapes[i][1])),
                    overlap=overlap,
                )
            )
        return found


def _bare(word: str) -> str:
    return f"A {word}."


def _box(top: int, left: int, bottom: int, right: int) -> Tensor:
    region = torch.zeros(1, SIDE, SIDE)
    region[:, top:bottom, left:right] = 1
    return region


_MIDDLE = _box(SIDE // 8, SIDE // 8, SIDE, SIDE - SIDE // 8)
"""All that the small world's subjects ever cover."""
_CORNER = _box(0, 0, SIDE // 8, SIDE // 8)


def looks(reading: Reading) -> Tensor:
    """What tells subjects apart, as vectors [B, N] whose distance says how alike they are."""
    shares = [reading.named[name].softmax(dim=1) for name in ("class", "pattern")]
    colours, shape, count = (reading.numbers[:, part] for part in (COLOURS, SHAPE, COUNT))
    return torch.cat([*shares, colours.clamp(-1, 1), 0.5 * shape, 0.25 * count], dim=1)
