"""Stage 3: the vision tower of MoMA's language model learns to see, as LLaVA's is CLIP's, which had learnt before.

With the language model behind it, it came to tell colours and patterns but not shapes; asked directly, it does.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .data import scene_of
from .description import SIZE, described, part_of, weights
from .language import SubjectReader, language_shape, reference_pixels
from .loop import Plan, Start, Training
from .painter import paint

PLAN = Plan(samples=150_000, batch=32, rate=1e-3, warm_up=50, ema=0.995, muon=2e-3)
PARTS = ("mllm.vision.", "mllm.projector.")
"""Of the language model's weights, those of this stage."""


class Seeing(nn.Module):
    """Vision tower and projector of a language model, with a head that is used here only."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        self.mllm = SubjectReader().mllm
        self.mllm.language.requires_grad_(False)
        width = language_shape().hidden_size
        self.head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, SIZE))

    def forward(self, pixels: Tensor) -> Tensor:
        """What is seen in references [B, 3, 112, 112], as `described` says it: [B, SIZE]."""
        features = self.mllm.image_features(pixels)
        return self.head(torch.cat([features.mean(dim=1), features.amax(dim=1)], dim=1))


class _References(Dataset[tuple[Tensor, Tensor]]):
    """References and what they show, of the subjects from `start` to `end`."""

    def __init__(self, start: int, end: int) -> None:
        self._subjects = range(start, end)

    def __len__(self) -> int:
        return len(self._subjects)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = scene_of(2 * self._subjects[index])
        return reference_pixels(*paint(scene)), described(scene)


def train(folder: Path, device: torch.device, plan: Plan = PLAN, start: Start | None = None) -> dict[str, Tensor]:
    """Train, or go on, until the plan is fulfilled: the averaged weights of `PARTS`, by their names in the reader."""
    torch.manual_seed(0)
    training = Training(Seeing(), plan, folder, device, start=start)
    references = _References(training.seen, plan.samples + plan.batch)
    source = iter(DataLoader(references, batch_size=plan.batch))
    counts = weights()
    counts[part_of("place")] = 0.0  # The product puts references on white.

    def loss_of(_: int) -> Tensor:
        pixels, target = next(source)
        with torch.autocast(device.type, torch.bfloat16):
            seen = training.module(pixels.to(device))
        return ((seen.float() - target.to(device)).square() * counts.to(device)).mean()

    training.run(loss_of, lambda: None)
    return {name: value for name, value in training.averaged().items() if name.startswith(PARTS)}
