"""From ComfyUI's image and mask tensors to the 512x512 reference that MoMA works on."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 512
FITS = ("squash", "pad", "crop")
"""How a non-square reference becomes square. The released code squashes."""


@dataclass(frozen=True)
class References:
    """N reference pictures: `images` [N, 512, 512, 3] uint8, `masks` [N, 512, 512] bool."""

    images: Tensor
    masks: Tensor


def prepare_references(image: Tensor, mask: Tensor | None, fit: str = "squash") -> References:
    """Make the references from an IMAGE and a MASK.

    Args:
        image: [N, H, W, C] or [H, W, C] in 0..1; C may be 1 (grey), 2 (grey, alpha), 3 or 4 (RGBA).
        mask: [N, h, w] or [h, w] in 0..1, 1 on the subject, of any size (it is stretched over the image). None: the
            image's alpha channel if it has one, else the whole picture.
        fit: One of `FITS`: "squash" ignores the aspect ratio, "pad" adds white, "crop" cuts around the subject.

    Raises:
        ValueError: Naming the input: no picture, another number of masks than of pictures, a wrong shape, NaN, or an
            empty mask.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}.")
    pictures = _pictures(image)
    masks = [None] * len(pictures) if mask is None else _masks(mask, len(pictures))
    squares = [_square(one, stencil, fit) for one, stencil in zip(pictures, masks, strict=True)]
    empty = [i for i, (_, inside) in enumerate(squares) if not inside.any()]
    if empty:
        which = "" if len(squares) == 1 else f" for picture {empty[0] + 1} of {len(squares)}"
        raise ValueError(
            f"mask is empty{which}: no pixel is marked as the subject. Paint the subject in the mask editor, or "
            "connect a background-removal mask. (Load Image gives an all-black mask for a picture without "
            "transparency; for a cut-out PNG, invert its mask: there 1 is the transparent part.)"
        )
    images, insides = (torch.from_numpy(np.stack(part)) for part in zip(*squares, strict=True))
    return References(images, insides)


def _square(pixels: Tensor, mask: np.ndarray | None, fit: str) -> tuple[np.ndarray, np.ndarray]:
    """One picture [H, W, C] and its mask [h, w] uint8 to [512, 512, 3] uint8 and [512, 512] bool."""
    colours, alpha = _split_alpha(pixels)
    chosen = alpha if mask is None else mask
    picture = Image.fromarray(colours, "RGB")
    if chosen is None:
        chosen = np.full(colours.shape[:2], 255, np.uint8)
    stencil = Image.fromarray(chosen, "L")
    if fit != "squash":
        stencil = stencil.resize(picture.size, Image.Resampling.BILINEAR)
        picture, stencil = (_pad if fit == "pad" else _crop)(picture, stencil)
    size = (SIZE, SIZE)
    square = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    inside = np.asarray(stencil.resize(size, Image.Resampling.BILINEAR)) > 0
    return square, inside


def _pictures(image: Tensor) -> list[Tensor]:
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[3] not in (1, 2, 3, 4) or 0 in batch.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [pictures, height, width, 1 to 4 channels].")
    return list(_finite(batch, "image"))


def _masks(mask: Tensor, pictures: int) -> list[np.ndarray]:
    batch = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
    batch = batch[None] if batch.ndim == 2 else batch
    if batch.ndim != 3 or 0 in batch.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [masks, height, width].")
    if batch.shape[0] != pictures:
        raise ValueError(
            f"mask holds {batch.shape[0]} mask(s), image {pictures} picture(s); each reference picture needs its own. "
            "Pictures with masks of their own can be extracted one by one and joined with Combine MoMA Subjects."
        )
    return [_bytes(one) for one in _finite(batch, "mask")]


def _finite(values: Tensor, name: str) -> Tensor:
    values = values.detach().to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values; the node that made it failed (often a VAE in fp16).")
    return values


def _bytes(values: Tensor) -> np.ndarray:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _split_alpha(pixels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    channels = pixels.shape[2]
    alpha = _bytes(pixels[..., -1]) if channels in (2, 4) else None
    colours = pixels[..., :1].expand(-1, -1, 3) if channels < 3 else pixels[..., :3]
    return _bytes(colours), alpha


def _pad(picture: Image.Image, stencil: Image.Image) -> tuple[Image.Image, Image.Image]:
    side = max(picture.size)
    corner = ((side - picture.width) // 2, (side - picture.height) // 2)
    square, inside = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
    square.paste(picture, corner)
    inside.paste(stencil, corner)
    return square, inside


def _crop(picture: Image.Image, stencil: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The largest square whose centre is nearest to that of the subject."""
    side = min(picture.size)
    left, top, right, bottom = stencil.getbbox() or (0, 0, *picture.size)
    x = min(max((left + right - side) // 2, 0), picture.width - side)
    y = min(max((top + bottom - side) // 2, 0), picture.height - side)
    box = (x, y, x + side, y + side)
    return picture.crop(box), stencil.crop(box)
