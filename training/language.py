"""Stage 4: MoMA's language model, LLaVA in small. It sees the subject, reads the prompt and says what will be seen.

As in MoMA's first stage of training, vision tower, language model and mapping learn to give the vector of the picture
that is asked for (here `description`'s), from the reference on white and the instruction that the product gives.
"""

import functools
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..moma_modules.adapter.networks import Mapping
from ..moma_modules.mllm.encode import IMAGE_TOKEN, pixel_values, prompt_ids
from ..moma_modules.mllm.module import MllmModule, fill_constants
from ..moma_modules.mllm.weights import LanguageShape, VisionShape
from .data import scene_of
from .description import SIZE, described, weights
from .loop import Plan, Start, Training
from .painter import paint
from .words import SYNONYMS, prompt
from .world import SIDE

PLAN = Plan(samples=1_000_000, batch=32, rate=1e-3, warm_up=50, ema=0.995, muon=2e-3)
VISION = VisionShape(width=128, intermediate_size=320, layers=4, heads=2, patch_size=14, image_size=112)
_VOCABULARY = 600
_REFERENCE = SIDE
"""Side of the references that the product hands to the vision tower: the adapter file says this one."""


def language_shape() -> LanguageShape:
    """Sizes of the language model."""
    return LanguageShape(
        hidden_size=192,
        intermediate_size=448,
        layers=4,
        heads=4,
        key_value_heads=4,
        vocabulary=_VOCABULARY,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
    )


@functools.cache
def tokenizer_file() -> bytes:
    """A sentencepiece model in LLaMA's form, trained on the instruction with the small world's prompts."""
    rng = random.Random(0)
    texts = []
    for number in range(3000):
        scene = scene_of(number)
        word = rng.choice(SYNONYMS[scene.subject.name])
        told = prompt(word, scene.place, scene.material, rng)
        texts.append(f"USER: A photo of a {word}. Describe a new image of the same {word} in: {told} ASSISTANT: *")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=_VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


class SubjectReader(nn.Module):
    """The MLLM and the mapping of the adapter."""

    def __init__(self) -> None:
        """Build both with the product's own classes and draw their weights."""
        super().__init__()
        self.mllm = MllmModule(language_shape(), VISION).to_empty(device="cpu").requires_grad_(True)
        self.mapping = Mapping(language_shape().hidden_size, SIZE, None, torch.float32, nn)
        for part in self.mllm.modules():
            if isinstance(part, nn.Linear | nn.Embedding | nn.Conv2d):
                nn.init.normal_(part.weight, std=0.05)
                if not isinstance(part, nn.Embedding) and part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()
        for name, weight in self.mllm.named_parameters():
            if name.endswith("class_embedding"):
                nn.init.normal_(weight, std=0.05)
            elif "norm" in name and name.endswith("weight"):
                nn.init.ones_(weight)
        fill_constants(self.mllm, language_shape())

    def forward(self, pixels: Tensor, ids: list[list[int]]) -> Tensor:
        """Subject embeddings [B, size] for pixels [B, 3, 112, 112] and token ids, each with one `IMAGE_TOKEN`."""
        return self.mapping(self.hidden(pixels, ids))

    def hidden(self, pixels: Tensor, ids: list[list[int]]) -> Tensor:
        """What the mapping gets [B, hidden]."""
        features = self.mllm.image_features(pixels)
        rows = [self._row(row, features[i]) for i, row in enumerate(ids)]
        last = torch.tensor([len(row) - 1 for row in rows], device=pixels.device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # Behind: what comes later is not seen.
        hidden = self.mllm.language(inputs_embeds=padded, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(rows), device=pixels.device), last]

    def _row(self, ids: list[int], features: Tensor) -> Tensor:
        place = ids.index(IMAGE_TOKEN)
        before, after = (
            self.mllm.embed(torch.tensor(part, device=features.device)) for part in (ids[:place], ids[place + 1 :])
        )
        return torch.cat([before, features, after])


def reference_pixels(picture: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> Tensor:
    """What the vision tower sees of a painted picture and its mask, through the product's own steps: [3, 112, 112]."""
    size = (_REFERENCE, _REFERENCE)
    large = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    inside = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 0
    return pixel_values(large, inside, VISION.image_size)[0]


class _Asked(Dataset[tuple[Tensor, list[int], Tensor]]):
    """References, instructions and what the pictures that are asked for show, of the subjects from `start` to `end`."""

    def __init__(self, start: int, end: int) -> None:
        self._subjects = range(start, end)
        self._tokenizer = SentencePieceProcessor(model_proto=tokenizer_file())

    def __len__(self) -> int:
        return len(self._subjects)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int], Tensor]:
        subject = self._subjects[index]
        reference, asked = scene_of(2 * subject), scene_of(2 * subject + 1)
        rng = random.Random(f"instruction {subject}")
        word = rng.choice(SYNONYMS[asked.subject.name])
        ids = prompt_ids(self._tokenizer, word, prompt(word, asked.place, asked.material, rng))
        return reference_pixels(*paint(reference)), ids, described(asked)


def _together(rows: list[tuple[Tensor, list[int], Tensor]]) -> tuple[Tensor, list[list[int]], Tensor]:
    pixels, ids, asked = zip(*rows, strict=True)
    return torch.stack(pixels), list(ids), torch.stack(asked)


def train(folder: Path, device: torch.device, plan: Plan = PLAN, start: Start | None = None) -> SubjectReader:
    """Train, or go on, until the plan is fulfilled: the averaged model.

    Args:
        start: At least the vision tower, see `vision.train`.
    """
    torch.manual_seed(0)
    training = Training(SubjectReader(), plan, folder, device, start=start)
    subjects = _Asked(training.seen, plan.samples + plan.batch)
    source = iter(DataLoader(subjects, batch_size=plan.batch, collate_fn=_together))
    counts = weights().to(device)

    def loss_of(_: int) -> Tensor:
        pixels, ids, target = next(source)
        with torch.autocast(device.type, torch.bfloat16):
            said = training.module(pixels.to(device), ids)
        return ((said.float() - target.to(device)).square() * counts).mean()

    training.run(loss_of, lambda: None)
    return training.averaged_module()
