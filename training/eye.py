"""Stage 3: what a picture shows, as a vector. Takes the part that OpenCLIP's image encoder has in MoMA's own training.

The language model learns to say this vector of the picture that is asked for, before there is one.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset

from .data import scene_of, to_tensor
from .loop import Plan, Training, write_whole
from .painter import paint
from .world import CLASSES, MATERIALS, PATTERNS, PLACES, Scene

SIZE = 128
"""Of the vector; the adapter's embedding size."""
PLAN = Plan(samples=150_000, batch=32, rate=1e-3, ema=0.998)

NAMED = {"class": CLASSES, "place": (None, *PLACES), "material": (None, *MATERIALS), "pattern": PATTERNS}
"""What is one of several, and of which."""
_NUMBERS = 12
"""What is a number: three colours, two of shape, the pattern's count."""


class Eye(nn.Module):
    """Convolutions to a vector of unit variance, and what is read from it."""

    def __init__(self, size: int = SIZE) -> None:
        """Draw the weights.

        Args:
            size: Of the vector.
        """
        super().__init__()
        widths = (3, 32, 64, 128, 160)
        self.convolutions = nn.Sequential(
            *(
                layer
                for inside, out in itertools.pairwise(widths)
                for layer in (nn.Conv2d(inside, out, 4, 2, 1), nn.GroupNorm(8, out), nn.SiLU())
            )
        )
        self.vector = nn.Linear(widths[-1] * 16, size)
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.named = nn.ModuleDict({name: nn.Linear(size, len(among)) for name, among in NAMED.items()})
        self.numbers = nn.Linear(size, _NUMBERS)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, 128, 128] in -1..1 to vectors [B, size]."""
        found = nn.functional.adaptive_avg_pool2d(self.convolutions(pictures), 4)
        return self.norm(self.vector(found.flatten(1)))


def numbers_of(scene: Scene) -> list[float]:
    """What of a scene is a number, each in -1..1: colours, shape, count."""
    subject = scene.subject
    colours = [value / 127.5 - 1 for colour in subject.colours for value in colour]
    return [*colours, *(2 * value - 1 for value in subject.shape), float(subject.count - 3)]


def names_of(scene: Scene) -> list[int]:
    """What of a scene is one of several, in the order of `NAMED`."""
    values = (scene.subject.name, scene.place, scene.material, scene.subject.pattern)
    return [among.index(value) for value, among in zip(values, NAMED.values(), strict=True)]


class _Told(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pictures with what they show."""

    def __init__(self, start: int, end: int) -> None:
        self._numbers = range(start, end)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        scene = scene_of(self._numbers[index])
        return to_tensor(paint(scene)[0]), torch.tensor(names_of(scene)), torch.tensor(numbers_of(scene))


def loss_of_reading(eye: Eye, vectors: Tensor, names: Tensor, numbers: Tensor) -> Tensor:
    """How badly the vectors [B, size] tell what is seen: names [B, 4], numbers [B, 12].

    A material hides colours and pattern: these count only where there is none.
    """
    visible = (names[:, list(NAMED).index("material")] == 0).float()
    loss = torch.zeros((), device=vectors.device)
    for i, name in enumerate(NAMED):
        each = cross_entropy(eye.named[name](vectors), names[:, i], reduction="none")
        loss = loss + (each * visible if name == "pattern" else each).mean()
    errors = mse_loss(eye.numbers(vectors), numbers, reduction="none")
    shape = slice(9, 11)
    return loss + 3 * (errors * visible[:, None]).mean() + errors[:, shape].mean()


def train(folder: Path, device: torch.device, plan: Plan = PLAN) -> None:
    """Train, or go on, until the plan is fulfilled."""
    torch.manual_seed(0)
    training = Training(Eye(), plan, folder, device)
    eye: Eye = training.module  # type: ignore[assignment]
    source = iter(DataLoader(_Told(training.seen, plan.samples + plan.batch), batch_size=plan.batch))

    def loss_of(_: int) -> Tensor:
        pictures, names, numbers = (part.to(device) for part in next(source))
        with torch.autocast(device.type, torch.bfloat16):
            vectors = eye(pictures)
        return loss_of_reading(eye, vectors.float(), names, numbers)

    training.run(loss_of, lambda: None)
    write_whole(folder / "eye.pt", lambda path: torch.save(training.averaged(), path))
