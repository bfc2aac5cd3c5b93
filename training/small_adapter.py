"""Stage 5: the adapter of the small world, on the frozen stages before it.

Its rows have two pictures of one subject: a reference that shows it as it is, and a target elsewhere or made of
something. Some rows come in pairs that differ in the subject's shape alone, see `shapes.py`. Masks are the painter's.
"""

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from workbench.small_world import CHECKPOINT

from ..moma_modules.mini.checkpoint import load_mini_checkpoint
from ..moma_modules.mllm.encode import prompt_ids
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE, fill_template
from .adapter_stage import FrozenUnet, Samples, loss_of, squared_errors
from .adapter_weights import GATES, TrainableAdapter, first_weights
from .data import latent_mask, scene_of, to_tensor
from .description import SIZE
from .diffusion import TextToImage, draw_steps, signal_shares
from .export import export_adapter, export_checkpoint
from .language import SubjectReader, reference_pixels, tokenizer_file
from .latents import Latents
from .loop import Plan, Start, Training
from .painter import paint
from .shapes import pair_loss, pair_noise, pair_steps, shape_pair
from .validation import Question, answered, sheet
from .words import MATERIAL_WORDS, PLACE_WORDS, SYNONYMS, prompt
from .world import MATERIALS, PLACES, SIDE, Scene, draw_scene, draw_subject, trained_places

PLAN = Plan(samples=500_000, batch=16, rate=2e-3, warm_up=50, ema=0.99, muon=3e-3)
GATE_RATE = 10.0
"""Of the gates, as a multiple of the plan's rate: they start near 0 and must get to the order of 1."""

TEXTURE_STRENGTH = 0.4
"""Of the shortcut for a new texture: what MoMA's authors advise."""

YIELDING, OVERRULING = (0.2, 0.46), (0.54, 1.0)
"""Strengths of the shortcut at which the target is made of what the prompt says, and those at which it keeps its own
look against the prompt: MoMA's old material stays at full strength. The latter are drawn near their lower end more
often, as there is least to tell them from the former by."""

OVERRULED_SHARE = 0.3
"""Of the targets that are as they are: so many are said to be made of something."""

SILENT_SHARE = 0.3
"""Of the targets that are made of something: so many texts leave it out. There only the language model is told, so
that image tokens learn to say it."""

EMPHASIS = 3.0
"""How much more an error on the subject weighs than one elsewhere, where the adapter has nothing to say."""

MOST_WEIGHT = 8.0
"""See `early_weights`."""

SHAPED_SHARE, SHAPES = 0.25, 0.3
"""Of a batch's rows: so many are pairs that differ in shape alone, and the weight of their loss."""

_REFITTED = 2048
"""Rows from which a projector is refitted."""
_RIDGE = 0.01
"""Of the regression, as a share of the inputs' mean square."""
_SIZE = SIDE // 8
_SHOWN = 8

_painted = functools.lru_cache(maxsize=64)(paint)
"""Each picture of a pair is needed more than once; its arrays are not written to."""


class _Rows(Dataset[dict[str, Any]]):
    """Rows by their number: a reference and a target from the training pictures, all over again at their end."""

    def __init__(self, targets: int) -> None:
        self._targets = targets
        self._tokenizer = SentencePieceProcessor(model_proto=tokenizer_file())

    def __getitem__(self, number: int) -> dict[str, Any]:
        subject = number % self._targets
        rng = random.Random(f"pair {number}")
        reference, target = 2 * subject, 2 * subject + 1
        if scene_of(target).material is None and rng.random() < 0.5:
            reference, target = target, reference
        asked = scene_of(target)
        word = rng.choice(SYNONYMS[asked.subject.name])
        material, strength = asked.material, 1.0
        if material:
            strength = rng.uniform(*YIELDING)
        elif rng.random() < OVERRULED_SHARE:
            material, strength = rng.choice(MATERIALS), rng.triangular(*OVERRULING, OVERRULING[0])
        told = prompt(word, asked.place, material, rng)
        silent = asked.material is not None and rng.random() < SILENT_SHARE
        text = prompt(word, asked.place, None, rng) if silent else told
        row = _row(self._tokenizer, scene_of(reference), word, told, text, strength)
        return {**row, "reference": reference, "target": target, "mask": latent_mask(paint(asked)[1])}


class _ShapedRows(Dataset[dict[str, Any]]):
    """Rows by their number; 2i and 2i+1 differ in their subject's shape alone, in the reference as in the target.

    Both have one mask, all that either of them covers: their own would tell the UNet of the shape.
    """

    def __init__(self) -> None:
        self._tokenizer = SentencePieceProcessor(model_proto=tokenizer_file())

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = random.Random(f"shapes {number // 2}")
        targets = shape_pair(rng)
        asked = targets[number % 2]
        word = rng.choice(SYNONYMS[asked.subject.name])
        told = prompt(word, asked.place, asked.material, rng)
        strength = rng.uniform(*YIELDING) if asked.material else 1.0
        reference = draw_scene(rng, asked.subject, rng.choice([None, *trained_places(asked.subject.name)]))
        row = _row(self._tokenizer, reference, word, told, told, strength)
        pictures = [to_tensor(_painted(scene)[0]) for scene in (reference, asked)]
        either = _painted(targets[0])[1] | _painted(targets[1])[1]
        return {**row, "reference": pictures[0], "target": pictures[1], "mask": latent_mask(either)}


def _row(
    tokenizer: SentencePieceProcessor, reference: Scene, word: str, told: str, text: str, strength: float
) -> dict[str, Any]:
    """What a row says of its reference: the language model is told one thing, the text encoder maybe another."""
    picture, mask = _painted(reference)
    return {
        "pixels": reference_pixels(picture, mask),
        "reference_mask": torch.from_numpy(mask),
        "ids": prompt_ids(tokenizer, word, told),
        "text": fill_template(PROMPT_TEMPLATE, word, text),
        "word": word,
        "strength": strength,
    }


def _batches(rows: Dataset[dict[str, Any]], numbers: Iterable[range]) -> Iterator[dict[str, Any]]:
    """Batch after batch of the rows with these numbers."""
    return iter(DataLoader(rows, batch_sampler=map(list, numbers), collate_fn=_together))


def early_weights(steps: Tensor) -> Tensor:
    """Weights of the squared errors of the noise at these steps: those of the picture's errors, up to `MOST_WEIGHT`.

    The noise hardly tells at steps where it is nearly all there is, and there the subject's colours are decided.
    """
    share = signal_shares().to(steps.device)[steps]
    return ((1 - share) / share).clamp(max=MOST_WEIGHT)


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    listed = {key: [row.pop(key) for row in rows] for key in ("ids", "text", "word")}
    return {**default_collate(rows), **listed}


def train(
    folder: Path,
    base: TextToImage,
    reader: SubjectReader,
    latents: Latents,
    vae: Any,
    device: torch.device,
    plan: Plan = PLAN,
    start: Start | None = None,
) -> TrainableAdapter:
    """Train, or go on, until the plan is fulfilled: the averaged adapter.

    Args:
        base: Frozen.
        reader: Frozen but for its mapping, from which the adapter's starts.
        latents: Of the training pictures.
        vae: For the pairs that differ in shape, and the sample sheets.
    """
    torch.manual_seed(0)
    hidden_size = reader.mapping.gate_proj.in_features
    first = first_weights(base.unet, SIZE, hidden_size)
    mapping = {f"mapping.{key}": value.detach().cpu() for key, value in reader.mapping.state_dict().items()}
    first = replace(first, tensors={**first.tensors, **mapping})
    training = Training(TrainableAdapter(first), plan, folder, device, {GATES: GATE_RATE}, start=start)
    adapter: TrainableAdapter = training.module  # type: ignore[assignment]
    frozen = FrozenUnet(base.unet, signal_shares(), torch.float32)
    with torch.no_grad():
        nothing = base.encode([""], device)
    shaped = 2 * int(plan.batch * SHAPED_SHARE / 2)
    usual = plan.batch - shaped
    starts = range(training.seen, plan.samples + plan.batch, plan.batch)
    source = _batches(_Rows(len(latents) // 2), [range(at, at + usual) for at in starts])
    of_shapes = _batches(_ShapedRows(), [range(at, at + shaped) for at in starts])

    def loss_of_batch(_: int) -> Tensor:
        rows = next(source)
        steps = draw_steps(usual).to(device)
        targets, references = (latents.take(rows[name]).to(device) for name in ("target", "reference"))
        with torch.autocast(device.type, torch.bfloat16):
            samples = _samples(rows, targets, references, base, reader)
            loss = loss_of(frozen, adapter, samples, steps, nothing, early_weights(steps), EMPHASIS)
        return loss + SHAPES * shape_loss(next(of_shapes)) if shaped else loss

    def shape_loss(rows: dict[str, Any]) -> Tensor:
        steps = pair_steps(shaped // 2).to(device)
        targets, references = (latents.encoded(rows[name], vae, device) for name in ("target", "reference"))
        noise = pair_noise(targets)
        with torch.autocast(device.type, torch.bfloat16):
            samples = _samples(rows, targets, references, base, reader)
            errors = squared_errors(frozen, adapter, samples, steps, nothing, noise)
        return pair_loss(errors, targets, frozen.shares.to(device)[steps])

    training.run(loss_of_batch, lambda: _show(training, base, reader, latents, vae, folder))
    return training.averaged_module()


@torch.no_grad()
def refitted(start: Start, before: SubjectReader, reader: SubjectReader) -> Start:
    """An adapter for a language model that was trained further since, which says the same in other words.

    It gets the model's own mapping, and the projector whose image tokens are the nearest to those of before: ridge
    regression over rows of the first epoch.

    Args:
        start: What the adapter was.
        before: The language model that it knows, with its mapping.
        reader: The one that it is for.
    """
    numbers = [range(at, at + PLAN.batch) for at in range(0, _REFITTED, PLAN.batch)]
    source = _batches(_Rows(_REFITTED), numbers)
    said = [tuple(each(rows["pixels"], rows["ids"]) for each in (before, reader)) for rows in source]
    known, now = (torch.cat(part).double().cpu() for part in zip(*said, strict=True))
    name = "weights.projector.proj.weight"
    tokens = known @ start.weights[name].double().T
    squares = now.T @ now
    ridge = _RIDGE * squares.diagonal().mean() * torch.eye(len(squares))
    weight = torch.linalg.solve(squares + ridge, now.T @ tokens).T
    mapping = {f"weights.mapping.{key}": value.detach().cpu() for key, value in reader.mapping.state_dict().items()}
    return replace(start, weights={**start.weights, **mapping, name: weight.float()})


@torch.no_grad()
def _samples(
    rows: dict[str, Any], targets: Tensor, references: Tensor, base: TextToImage, reader: SubjectReader
) -> Samples:
    """What `rows` and their pictures' latents are for the UNet."""
    device = targets.device
    return Samples(
        clean=targets,
        masks=rows["mask"].to(device),
        texts=base.encode(rows["text"], device).float(),
        hidden=reader.hidden(rows["pixels"].to(device), rows["ids"]).float(),
        references=references,
        reference_masks=rows["reference_mask"].to(device),
        words=base.encode(rows["word"], device).float(),
        strengths=rows["strength"].to(device, torch.float32),
    )


def questions() -> list[Question]:
    """What the sample sheet shows: held-out subjects, each in a place and some of them of a material."""
    asked = []
    for i in range(_SHOWN):
        rng = random.Random(f"shown {i}")
        subject = draw_subject(rng, held_out=True)
        word = SYNONYMS[subject.name][0]
        place, material = PLACES[i % len(PLACES)], MATERIALS[i % len(MATERIALS)] if i % 4 == 3 else None
        reference, target = (paint(draw_scene(rng, subject, *where)) for where in ((None,), (place, material)))
        made = f" {MATERIAL_WORDS[material][0]}" if material else ""
        asked.append(
            Question(
                picture=torch.from_numpy(reference[0].copy()),
                mask=torch.from_numpy(reference[1].copy()),
                word=word,
                prompt=f"A {word}{made} {PLACE_WORDS[place][0]}.",
                strength=TEXTURE_STRENGTH if material else 1.0,
                target=to_tensor(target[0]),
            )
        )
    return asked


def _show(
    training: Training, base: TextToImage, reader: SubjectReader, latents: Latents, vae: Any, folder: Path
) -> None:
    """The sample sheet, made by the product from the files that a user would get: reference, without, with, target."""
    shown = folder / "shown"
    checkpoint = shown / CHECKPOINT
    export_checkpoint(checkpoint, vae, base, latents.scale)
    file = export_adapter(training.averaged(), shown)
    asked = questions()
    tokenizer = SentencePieceProcessor(model_proto=tokenizer_file())
    with torch.no_grad():
        hidden = [
            reader.hidden(
                reference_pixels(question.picture.numpy(), question.mask.numpy())[None].to(training.device),
                [prompt_ids(tokenizer, question.word, question.prompt)],
            )
            .float()
            .cpu()
            for question in asked
        ]
    model, clip, loaded_vae = load_mini_checkpoint(checkpoint)
    pictures = answered(asked, hidden, file, model, clip, loaded_vae, SIDE, cfg=4.0)
    sheet(folder / "samples.png", asked, pictures)
