"""What a subject adds to a run's layers, made concrete on the device: image tokens, reference, areas."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .caches import KeysValues
from .reference import reference_keys_values
from .settings import SubjectSettings
from .unet import BLOCKS
from .whereabouts import Whereabouts


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


@dataclass(frozen=True)
class SubjectRun:
    """One subject in one run: settings made concrete on the device.

    Attributes:
        image_tokens: Keys and values of the image tokens, or None where they are off.
        reference: Per block the keys and values of the references [1, N, C].
        cross_area, self_area: [B, H, W] where each part may act (region masks), or None for everywhere.
    """

    settings: SubjectSettings
    image_tokens: ImageTokenLayers | None
    reference: KeysValues
    cross_area: Tensor | None
    self_area: Tensor | None


def subject_run(
    entry: SubjectSettings, guider: Any, options: dict[str, Any], noise: Tensor, where: Whereabouts
) -> SubjectRun:
    """What a subject adds in a run whose model is loaded: projected, looked at, placed.

    Args:
        guider: The run's.
        options: Its transformer options.
        noise: [B, C, h, w]; the run's canvas and device.
    """
    model, key = guider.inner_model, entry.subject.key
    image_tokens, shortcut = entry.image_tokens, entry.shortcut
    tokens: ImageTokenLayers | None = None
    reference: KeysValues = {}
    if image_tokens is not None and image_tokens.weight != 0 and not where.is_out(image_tokens, key):
        tokens = image_token_layers(entry, noise.device, model.get_dtype_inference())
    if shortcut is not None and shortcut.strength != 0 and not where.is_out(shortcut, key):
        reference = reference_keys_values(guider, entry, shortcut, options, noise.device)
    return SubjectRun(
        settings=entry,
        image_tokens=tokens,
        reference=reference,
        cross_area=where.area(image_tokens, key, noise),
        self_area=where.area(shortcut, key, noise),
    )
