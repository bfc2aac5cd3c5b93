"""Stage 1: the autoencoder."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..moma_modules.mini.autoencoder import WIDTHS, Autoencoder
from .data import Pictures, batches, scene_of, to_tensor
from .loop import Plan, Start, Training
from .painter import paint

ENCODER = Plan(samples=18_000, batch=8, rate=2e-3, ema=0.998, muon=3e-3)
"""The first part, in which the encoder learns too. Then latents are encoded, and the decoder alone goes on."""

PLAN = Plan(samples=100_000, batch=8, rate=2e-3, ema=0.998, muon=3e-3)

_NOISE = 0.1
"""Standard deviation of noise on the latents: the decoder must not need more of them than diffusion will get right."""
_SMALL = 1e-3
"""Weight of the latents' mean square, which keeps them near 1."""


def build() -> Autoencoder:
    """The autoencoder, its weights drawn as PyTorch does."""
    return Autoencoder(WIDTHS, nn)


def initialise(model: nn.Module) -> None:
    """Draw weights as PyTorch does: ComfyUI's operations leave them as they are."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.Conv2d.reset_parameters(part)
        elif isinstance(part, nn.Linear):
            nn.Linear.reset_parameters(part)
        elif isinstance(part, nn.GroupNorm | nn.LayerNorm) and part.weight is not None:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def train(folder: Path, device: torch.device, plan: Plan, encoder: bool, start: Start | None = None) -> Autoencoder:
    """Train, or go on, until the plan is fulfilled: the averaged model.

    Args:
        encoder: Whether the encoder learns, or stays as it was averaged.
    """
    torch.manual_seed(0)
    training = Training(build(), plan, folder, device, start=start)
    model: Any = training.module
    if not encoder:
        training.freeze(("encoder.",))
    source = batches(Pictures(training.seen), plan.batch)

    def loss_of(_: int) -> Tensor:
        # Layers without normalisation are several times faster on a CPU with channels last.
        pictures = next(source).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(encoder):
                latents = model.encode(pictures).float()
            result = model.decode(latents + _NOISE * torch.randn(latents.shape).to(device)).float()
        return _difference(result, pictures) + _SMALL * latents.square().mean()

    training.run(loss_of, lambda: _sheet(training, folder / "samples.png"))
    return training.averaged_module()


def _difference(result: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute and squared error of values and of their steps from pixel to pixel, which keeps edges sharp."""
    error = result - pictures
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + error.square().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


@torch.no_grad()
def _sheet(training: Training, path: Path) -> None:
    """Eight pictures above what became of them."""
    model = build().to(training.device)
    model.load_state_dict(training.averaged())
    pictures = torch.stack([to_tensor(paint(scene_of(-1 - i))[0]) for i in range(8)]).to(training.device)
    save_sheet(path, [pictures, model.decode(model.encode(pictures))])


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """Rows of pictures [N, 3, H, W] in -1..1 as one PNG."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
    pixels = ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
