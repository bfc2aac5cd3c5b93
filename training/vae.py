"""Stage 1: the autoencoder, SD1.5's in small: 8x8 pixels become one place of 4 channels."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .data import Pictures, batches, scene_of, to_tensor
from .loop import Plan, Training, write_whole
from .painter import paint

CONFIG: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
PLAN = Plan(samples=32_000, batch=8, rate=1e-3, ema=0.998)
_CROP = 64
"""First pictures are seen in parts: four times as many for the same arithmetic."""
_WHOLE_FROM = 0.6
"""The share of samples after which whole pictures are seen."""
_KL = 1e-5


def build() -> Any:
    """ComfyUI's AutoencoderKL in small, its weights drawn as PyTorch does."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    model = AutoencoderKL(ddconfig=CONFIG, embed_dim=4)
    initialise(model)
    return model


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


def moments(model: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance [B, 4, H/8, W/8] of pictures [B, 3, H, W] in -1..1."""
    mean, log_variance = model.quant_conv(model.encoder(pictures)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 10)


def decoded(model: Any, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], about -1..1."""
    return model.decoder(model.post_quant_conv(latents)).float()


def train(folder: Path, device: torch.device, plan: Plan = PLAN) -> None:
    """Train, or go on, until the plan is fulfilled."""
    torch.manual_seed(0)
    training = Training(build(), plan, folder, device)
    model = training.module
    source: dict[bool, Any] = {}

    def loss_of(seen: int) -> Tensor:
        whole = seen >= _WHOLE_FROM * plan.samples
        size = plan.batch if whole else plan.batch * (128 // _CROP) ** 2
        if whole not in source:
            source[whole] = batches(Pictures(seen * (1 if whole else 4), None if whole else _CROP), size)
        pictures = next(source[whole]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = moments(model, pictures)
            latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            result = decoded(model, latents)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
        scale = 128 * 128 / pictures[0, 0].numel()
        return _difference(result, pictures) + _KL * kl * scale

    training.run(loss_of, lambda: _sheet(training, folder / "samples.png"))
    write_whole(folder / "vae.pt", lambda path: torch.save(training.averaged(), path))


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
    save_sheet(path, [pictures, decoded(model, moments(model, pictures)[0])])


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """Rows of pictures [N, 3, H, W] in -1..1 as one PNG."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
    pixels = ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
