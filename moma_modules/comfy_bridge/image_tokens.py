"""Keys and values of the image tokens: computed once per run, and laid out so that a forward picks its rows at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import SubjectSettings
from .unet import BLOCKS


@dataclass(frozen=True)
class ImageTokenLayers:
    """Those of all layers side by side.

    Attributes:
        flat: [2, 4, X]: negative then positive rows; per block the keys [C], then the values [C].
        sizes: C per block.
    """

    flat: Tensor
    sizes: tuple[int, ...]

    def keys_values(self, of_rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R, 4, C] of a block, from what `image_tokens_of_rows` gave."""
        size, start = self.sizes[block], 2 * sum(self.sizes[:block])
        return of_rows[..., start : start + size], of_rows[..., start + size : start + 2 * size]


def image_token_layers(entry: SubjectSettings, device: torch.device, dtype: torch.dtype) -> ImageTokenLayers:
    """Project a subject's embedding (positive rows) and a zero one (negative rows) for every cross-attention layer.

    Args:
        device: Where the run wants them; they are computed where the adapter is.
    """
    embedding = entry.subject.embedding.to(entry.adapter.device, dtype)
    module = entry.adapter.module
    tokens = module.projector(torch.cat([torch.zeros_like(embedding), embedding]))
    layers = [module.layer(2 * block + 1) for block in range(len(BLOCKS))]
    parts = [projection(tokens) for layer in layers for projection in (layer.to_k_ip, layer.to_v_ip)]
    return ImageTokenLayers(torch.cat(parts, dim=2).to(device), tuple(part.shape[2] for part in parts[::2]))


def image_tokens_of_rows(layers: ImageTokenLayers, positive: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 4, X] for rows that are positive (1) or negative (0)."""
    return layers.flat.to(dtype)[positive]
