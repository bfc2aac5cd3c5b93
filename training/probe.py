"""Reads pictures as the painter would describe them: class, place, material, pattern, colours, shape and where it is.

For measuring only. It learns from scenes of its own, apart from those of training, and nothing learns from it:
`python3 training/run.py --stage probe` makes the published one.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset

from .data import scene_of, to_tensor
from .description import COLOURS, NAMED, NUMBERS, names_of, numbers_of
from .loop import Plan, Start, Training, write_whole
from .painter import paint

PLAN = Plan(samples=60_000, batch=32, rate=1e-3, warm_up=50, ema=0.995, muon=2e-3)
FILE = Path(__file__).resolve().parent / "probe.safetensors"
"""The published one."""

MASK_SIDE = 16
"""Of the mask that it finds: the side of the latents."""

_APART = 100_000_000
"""Its pictures have numbers from here on, which training does not reach."""
_SIDE = 64


@dataclass(frozen=True)
class Reading:
    """What is read from B pictures.

    Attributes:
        named: Per name in `NAMED`: logits [B, of its values].
        numbers: As `numbers_of` [B, 12].
        masks: Logits of the subject's places [B, 16, 16].
    """

    named: dict[str, Tensor]
    numbers: Tensor
    masks: Tensor


class Probe(nn.Module):
    """Convolutions on pictures of half the size, with a head for each thing to be read."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        widths = (3, 32, 64, 128, 160)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inside, out, 4, 2, 1), nn.GroupNorm(8, out), nn.SiLU())
            for inside, out in itertools.pairwise(widths)
        )
        self.vector = nn.Sequential(nn.Linear(widths[-1] * 16, 256), nn.SiLU())
        self.named = nn.ModuleDict({name: nn.Linear(256, len(among)) for name, among in NAMED.items()})
        self.numbers = nn.Linear(256, NUMBERS)
        self.near, self.far = nn.Conv2d(widths[2], 32, 3, padding=1), nn.Conv2d(widths[4], 32, 1)
        self.mask = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Reading:
        """Read pictures [B, 3, 128, 128] in -1..1."""
        found, near = avg_pool2d(pictures, pictures.shape[-1] // _SIDE), pictures
        for i, stage in enumerate(self.stages):
            found = stage(found)
            near = found if i == 1 else near
        vector = self.vector(found.flatten(1))
        both = self.near(near) + interpolate(self.far(found), size=near.shape[-2:], mode="bilinear")
        return Reading(
            named={name: head(vector) for name, head in self.named.items()},
            numbers=self.numbers(vector),
            masks=self.mask(nn.functional.silu(both))[:, 0],
        )


class _Told(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Pictures with what they show: names, numbers and the share of each place that the subject covers."""

    def __init__(self, start: int, end: int) -> None:
        self._numbers = range(_APART + start, _APART + end)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scene = scene_of(self._numbers[index])
        picture, mask = paint(scene)
        covered = avg_pool2d(torch.from_numpy(mask).float()[None], mask.shape[0] // MASK_SIDE)[0]
        return to_tensor(picture), torch.tensor(names_of(scene)), torch.tensor(numbers_of(scene)), covered


def loss_of(reading: Reading, names: Tensor, numbers: Tensor, covered: Tensor) -> Tensor:
    """How wrong a reading is: names [B, 4], numbers [B, 12], covered [B, 16, 16].

    A material hides colours and pattern: these count only where there is none.
    """
    visible = (names[:, list(NAMED).index("material")] == 0).float()
    loss = binary_cross_entropy_with_logits(reading.masks, covered)
    for i, name in enumerate(NAMED):
        each = cross_entropy(reading.named[name], names[:, i], reduction="none")
        loss = loss + (each * visible if name == "pattern" else each).mean()
    errors = (reading.numbers - numbers).square()
    return loss + 3 * (errors[:, COLOURS] * visible[:, None]).mean() + errors[:, COLOURS.stop :].mean()


def train(folder: Path, device: torch.device, plan: Plan = PLAN, start: Start | None = None) -> Probe:
    """Train, or go on, until the plan is fulfilled: the averaged probe."""
    torch.manual_seed(0)
    training = Training(Probe(), plan, folder, device, start=start)
    source = iter(DataLoader(_Told(training.seen, plan.samples + plan.batch), batch_size=plan.batch))

    def loss_of_batch(_: int) -> Tensor:
        pictures, names, numbers, covered = (part.to(device) for part in next(source))
        # Generated pictures are less sharp than painted ones, and not as clean.
        if torch.rand(()) < 0.5:
            pictures = interpolate(avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
        pictures = pictures + 0.05 * torch.randn(pictures.shape).to(device)
        return loss_of(training.module(pictures), names, numbers, covered)

    training.run(loss_of_batch, lambda: None)
    return training.averaged_module()


def save(probe: Probe, file: Path = FILE) -> None:
    """Write it in 16 bits."""
    weights = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in probe.state_dict().items()}
    write_whole(file, lambda partial: save_file(weights, partial))


def load(file: Path = FILE) -> Probe:
    """The published probe."""
    probe = Probe()
    probe.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return probe.eval().requires_grad_(False)
