"""Stage 6: the adapter of the small world, on the frozen stages before it.

Its rows are pairs of pictures of one subject: a reference that shows it as it is, and a target elsewhere or made of
something. Masks are the painter's own.
"""

import random
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
from .adapter_stage import FrozenUnet, Samples, loss_of
from .adapter_weights import GATES, TrainableAdapter, first_weights
from .data import latent_mask, scene_of, to_tensor
from .description import SIZE
from .diffusion import TextToImage, draw_steps, signal_shares
from .export import export_adapter, export_checkpoint
from .language import SubjectReader, reference_pixels, tokenizer_file
from .latents import Latents
from .loop import Plan, Start, Training
from .painter import paint
from .validation import Question, answered, sheet
from .words import MATERIAL_WORDS, PLACE_WORDS, SYNONYMS, prompt
from .world import MATERIALS, PLACES, SIDE, draw_scene, draw_subject

PLAN = Plan(samples=300_000, batch=16, rate=2e-3, warm_up=50, ema=0.99, muon=3e-3)
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

_REFITTED = 2048
"""Rows from which a projector is refitted."""
_RIDGE = 0.01
"""Of the regression, as a share of the inputs' mean square."""
_SIZE = SIDE // 8
_SHOWN = 8


class _Pairs(Dataset[dict[str, Any]]):
    """Pairs of pictures of one subject, with what is said of the target; pair after pair, all over again at the end."""

    def __init__(self, start: int, end: int, pairs: int) -> None:
        self._numbers = range(start, end)
        self._pairs = pairs
        self._tokenizer = SentencePieceProcessor(model_proto=tokenizer_file())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._numbers[index]
        pair = number % self._pairs
        rng = random.Random(f"pair {number}")
        reference, target = 2 * pair, 2 * pair + 1
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
        picture, mask = paint(scene_of(reference))
        return {
            "reference": reference,
            "target": target,
            "pixels": reference_pixels(picture, mask),
            "reference_mask": torch.from_numpy(mask),
            "mask": latent_mask(paint(asked)[1]),
            "ids": prompt_ids(self._tokenizer, word, told),
            "text": fill_template(PROMPT_TEMPLATE, word, text),
            "word": word,
            "strength": strength,
        }


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
        vae: For the sample sheets.
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
    pairs = _Pairs(training.seen, plan.samples + plan.batch, len(latents) // 2)
    source = iter(DataLoader(pairs, batch_size=plan.batch, collate_fn=_together))

    def loss_of_batch(_: int) -> Tensor:
        rows = next(source)
        steps = draw_steps(plan.batch).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            samples = _samples(rows, base, reader, latents, device)
            return loss_of(frozen, adapter, samples, steps, nothing, early_weights(steps), EMPHASIS)

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
    pairs = DataLoader(_Pairs(0, _REFITTED, _REFITTED), batch_size=PLAN.batch, collate_fn=_together)
    said = [tuple(each(rows["pixels"], rows["ids"]) for each in (before, reader)) for rows in pairs]
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
    rows: dict[str, Any], base: TextToImage, reader: SubjectReader, latents: Latents, device: torch.device
) -> Samples:
    return Samples(
        clean=latents.take(rows["target"]).to(device),
        masks=rows["mask"].to(device),
        texts=base.encode(rows["text"], device).float(),
        hidden=reader.hidden(rows["pixels"].to(device), rows["ids"]).float(),
        references=latents.take(rows["reference"]).to(device),
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
