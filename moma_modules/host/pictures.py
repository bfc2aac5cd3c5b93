"""Pictures that explain: outlined masks, strips of masks, sheets of labelled pictures."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

OUTLINE = (255, 0, 200)
OUTLINE_SHARE = 0.01
"""Width of an outline, of the picture's height."""
GAP = 8
LABEL = 28
PAPER, INK = "white", "black"
THUMBNAIL = 128


def what_was_seen(images: Tensor, masks: Tensor) -> Tensor:
    """Each reference with its mask outlined, beside the subject on white as the MLLM gets it.

    Args:
        images: [N, H, W, 3] uint8.
        masks: [N, H, W] bool, True on the subject.

    Returns:
        [N, H, 2W + gap, 3] in 0..1.
    """
    return torch.cat([_seen(*pair) for pair in zip(images.numpy(), masks.numpy(), strict=True)])


def _seen(pixels: np.ndarray, inside: np.ndarray) -> Tensor:
    outlined = np.where(_edge(inside)[..., None], np.array(OUTLINE, np.uint8), pixels)
    on_white = np.where(inside[..., None], pixels, np.uint8(255))
    gap = np.full((pixels.shape[0], GAP, 3), 128, np.uint8)
    return _tensor(np.concatenate([outlined, gap, on_white], axis=1))


def coverage(masks: Tensor) -> str:
    """How much of the pictures a subject's masks [N, H, W] bool take, with advice where that is unlikely meant."""
    shares = masks.flatten(1).float().mean(dim=1).tolist()
    each = ", ".join(f"{share:.0%}" for share in shares)
    text = f"The mask covers {each} of the picture." if len(shares) == 1 else f"The masks cover {each} of the pictures."
    if max(shares) > 0.95:
        text += " That is nearly all: paint the subject alone, or remove the background."
    if min(shares) < 0.02:
        text += " That is hardly anything: is the whole subject painted?"
    return text


def film_strip(frames: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Masks one after another, each with its name above.

    Args:
        frames: Name and masks [B, h, w] in 0..1. One picture's frames fill a square; in a batch each picture has a row.

    Returns:
        [1, H, W, 3] in 0..1.
    """
    batch = frames[0][1].shape[0]
    tiles = [_captioned(_thumbnail(masks[i]), name) for i in range(batch) for name, masks in frames]
    across = math.ceil(math.sqrt(len(frames))) if batch == 1 else len(frames)
    width, height = tiles[0].size
    strip = Image.new("RGB", (across * (width + GAP), math.ceil(len(tiles) / across) * (height + GAP)), PAPER)
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i % across * (width + GAP), i // across * (height + GAP)))
    return _tensor(np.asarray(strip))


def contact_sheet(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str]) -> Tensor:
    """Pictures in rows and columns with labels above and at the left.

    Args:
        rows: As many pictures in each as there are `columns`, all of one size.
        names: One for each row; "" for none.

    Returns:
        [1, H, W, 3] in 0..1.
    """
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=LABEL * 0.6)
    left = GAP + max(round(font.getlength(name)) + (GAP if name else 0) for name in names)
    sheet = Image.new("RGB", (left + len(columns) * (width + GAP), LABEL + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        draw.text((left + i * (width + GAP) + width // 2, LABEL // 2), label, INK, font, anchor="mm")
    for j, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        top = LABEL + j * (height + GAP)
        draw.text((GAP, top + height // 2), name, INK, font, anchor="lm")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (left + i * (width + GAP), top))
    return _tensor(np.asarray(sheet))


def rgb(images: Tensor) -> Tensor:
    """[N, H, W, 3] of pictures [N, H, W, C] that are grey (C up to 2) or coloured, with or without transparency."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)


def picture(values: Tensor) -> Image.Image:
    """A picture of [H, W, 3] or a grey one of [H, W], in 0..1."""
    levels = (values.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(levels, "RGB" if levels.ndim == 3 else "L").convert("RGB")


def _thumbnail(mask: Tensor) -> Image.Image:
    large = picture(mask)
    width = max(1, round(THUMBNAIL * large.width / large.height))
    return large.resize((width, THUMBNAIL), Image.Resampling.NEAREST)


def _captioned(below: Image.Image, text: str) -> Image.Image:
    tile = Image.new("RGB", (below.width, below.height + LABEL), PAPER)
    draw = ImageDraw.Draw(tile)
    draw.text((below.width // 2, LABEL // 2), text, INK, ImageFont.load_default(size=LABEL * 0.6), anchor="mm")
    tile.paste(below, (0, LABEL))
    return tile


def _edge(inside: np.ndarray) -> np.ndarray:
    """[H, W] bool: a band along the border of the mask, also where that is the picture's own."""
    values = torch.from_numpy(inside).float()[None, None]
    margin = max(1, round(inside.shape[0] * OUTLINE_SHARE / 2) - 1)
    width = 2 * margin + 1
    padded = torch.nn.functional.pad(values, [margin] * 4)
    low = -torch.nn.functional.max_pool2d(-padded, width, stride=1)
    high = torch.nn.functional.max_pool2d(padded, width, stride=1)
    return (high - low)[0, 0].numpy() > 0


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]
