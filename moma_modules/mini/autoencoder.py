"""The small world's autoencoder: 8x8 pixels become one place of 4 channels, as in SD1.5, by few and cheap layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu

WIDTHS = (32, 64, 128)
"""Channels at a half, a quarter and an eighth of the pictures' size."""

_LATENT = 4


class _Residual(nn.Module):
    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.first = operations.Conv2d(width, width, 3, padding=1)
        self.second = operations.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(relu(x))))


class Autoencoder(nn.Module):
    """Convolutions without normalisation, so that colours come through as they are."""

    def __init__(self, widths: tuple[int, int, int], operations: Any) -> None:
        """Build it.

        Args:
            widths: See `WIDTHS`.
            operations: torch's `nn`, or one of ComfyUI's sets of layers, which leave weights to be loaded.
        """
        super().__init__()
        low, middle, high = widths

        def residual(width: int, count: int) -> list[nn.Module]:
            return [_Residual(width, operations) for _ in range(count)]

        self.encoder = nn.Sequential(
            operations.Conv2d(3, low, 4, 2, 1),
            *residual(low, 1),
            operations.Conv2d(low, middle, 4, 2, 1),
            *residual(middle, 1),
            operations.Conv2d(middle, high, 4, 2, 1),
            *residual(high, 2),
            operations.Conv2d(high, _LATENT, 1),
        )
        self.decoder = nn.Sequential(
            operations.Conv2d(_LATENT, high, 3, padding=1),
            *residual(high, 3),
            operations.Conv2d(high, 4 * middle, 1),
            nn.PixelShuffle(2),
            *residual(middle, 2),
            operations.Conv2d(middle, 4 * low, 1),
            nn.PixelShuffle(2),
            *residual(low, 2),
            operations.Conv2d(low, 4 * 12, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            operations.Conv2d(12, 3, 3, padding=1),
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1 to latents [B, 4, H/8, W/8]."""
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to pictures [B, 3, 8h, 8w], about -1..1."""
        return self.decoder(latents)


def widths_of(weights: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """The widths of an autoencoder by its weights."""
    low, middle, high = (len(weights[f"encoder.{place}.weight"]) for place in (0, 2, 4))
    return low, middle, high
