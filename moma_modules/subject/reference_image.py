"""From ComfyUI's image and mask tensors to the square reference that MoMA works on."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .reference_mask import DEFAULT_THRESHOLD, CutMask, covers_border, cut_mask, mask_from_alpha, mask_notes

FITS = ("squash", "pad", "crop")
"""How a non-square reference becomes square. The released code squashes."""


@dataclass(frozen=True)
class References:
    """N reference pictures.

    Attributes:
        images: [N, S, S, 3] uint8.
        masks: [N, S, S] bool, True on the subject.
        notes: What the user should know of how they were made, a sentence or two each.
    """

    images: Tensor
    masks: Tensor
    notes: tuple[str, ...] = ()


def prepare_references(
    image: Tensor,
    mask: Tensor | None,
    fit: str = "squash",
    threshold: float = DEFAULT_THRESHOLD,
    size: int = 512,
) -> References:
    """Make the references from an IMAGE and a MASK.

    Args:
        image: [N, H, W, C] or [H, W, C] in 0..1; C may be 1 (grey), 2 (grey, alpha), 3 or 4 (RGBA).
        mask: [N, h, w] or [h, w], 1 on the subject, of any size (it is stretched over the image). One mask is used for
            every picture; several masks of one picture are taken together. None: the image's alpha channel if it has
            one (see `mask_from_alpha`), else the whole picture.
        fit: One of `FITS`: "squash" ignores the aspect ratio, "pad" adds white, "crop" cuts around the subject.
        threshold: Where soft masks are cut, see `cut_mask`.
        size: S, the side of the references in pixels, as the adapter has it.

    Raises:
        ValueError: Naming the input: no picture, numbers of masks and of pictures that do not fit, a wrong shape, NaN,
            another scale than 0..1, an empty mask, or a subject in which there is only black.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}.")
    pictures = _pictures(image)
    masks, notes = ([None] * len(pictures), []) if mask is None else _masks(mask, len(pictures))
    squares, said = [], []
    for i, (pixels, own) in enumerate(zip(pictures, masks, strict=True)):
        which = "" if len(pictures) == 1 else f" for picture {i + 1} of {len(pictures)}"
        colours, cut, marked_by, about = _subject(pixels, own, threshold, which)
        square = _square(colours, cut.stencil, size, fit)
        _refuse_empty(square[1], which)
        blank = check_content(colours, cut, marked_by, which)
        squares.append(square)
        said.append(about if blank is None else [blank, *about])
    images, insides = (torch.from_numpy(np.stack(part)) for part in zip(*squares, strict=True))
    return References(images, insides, (*notes, *_together(said)))


def _subject(
    pixels: Tensor, mask: Tensor | None, threshold: float, which: str
) -> tuple[np.ndarray, CutMask, str, list[str]]:
    """One picture [H, W, C] and its mask [h, w].

    Returns:
        Its colours [H, W, 3] uint8, the mask after the cut, what that is from (see `WAYS_OUT`), what to say of it.
    """
    colours = _bytes(pixels[..., :1].expand(-1, -1, 3) if pixels.shape[2] < 3 else pixels[..., :3])
    alpha = pixels[..., -1] if pixels.shape[2] in (2, 4) else None
    if mask is not None:
        cut = cut_mask(mask, threshold)
        notes = mask_notes(cut, colours.shape[:2])
        if alpha is not None and float(alpha.min()) < 1:
            notes.append("The picture's transparency is not used, since a mask is connected.")
        return colours, cut, "background" if covers_border(cut.stencil > 0) else "mask", notes
    if alpha is None:
        return colours, cut_mask(torch.ones(colours.shape[:2])), "nothing", []
    chosen, notes = mask_from_alpha(alpha, which)
    return colours, cut_mask(chosen, threshold), "alpha" if notes else "nothing", notes


def _together(said: list[list[str]]) -> list[str]:
    """What is said of each picture, each note once; which pictures it is about unless it is about all."""
    notes = []
    for note in dict.fromkeys(note for about in said for note in about):
        numbers = [str(i + 1) for i, about in enumerate(said) if note in about]
        notes.append(note if len(numbers) == len(said) else f"Picture {', '.join(numbers)}: {note}")
    return notes


def _square(colours: np.ndarray, mask: np.ndarray, side: int, fit: str) -> tuple[np.ndarray, np.ndarray]:
    """One picture [H, W, 3] and its mask [h, w], both uint8, to [S, S, 3] uint8 and [S, S] bool."""
    picture, stencil = Image.fromarray(colours, "RGB"), Image.fromarray(mask, "L")
    if fit != "squash":
        stencil = stencil.resize(picture.size, Image.Resampling.BILINEAR)
        picture, stencil = (_pad if fit == "pad" else _crop)(picture, stencil)
    size = (side, side)
    square = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    inside = np.asarray(stencil.resize(size, Image.Resampling.BILINEAR)) > 0
    return square, inside


def _refuse_empty(inside: np.ndarray, which: str) -> None:
    if not inside.any():
        raise ValueError(
            f"mask is empty{which}: no pixel is marked as the subject. Paint the subject in the mask editor, or "
            "connect a background-removal mask. (Load Image gives an all-black mask for a picture without "
            "transparency; for a cut-out PNG, invert its mask: there 1 is the transparent part.)"
        )


def _pictures(image: Tensor) -> list[Tensor]:
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[3] not in (1, 2, 3, 4) or 0 in batch.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [pictures, height, width, 1 to 4 channels].")
    batch = _finite(batch, "image")
    check_range(batch)
    return list(batch)


def _masks(mask: Tensor, pictures: int) -> tuple[list[Tensor | None], list[str]]:
    """A mask [h, w] for each picture, and what to say where their numbers differ."""
    batch = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
    batch = batch[None] if batch.ndim == 2 else batch
    if batch.ndim != 3 or 0 in batch.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [masks, height, width].")
    batch = _finite(batch, "mask")
    count = len(batch)
    if count == pictures:
        return list(batch), []
    if count == 1:
        return [batch[0]] * pictures, [f"The one mask is used for each of the {pictures} pictures."]
    if pictures == 1:
        return [batch.amax(dim=0)], [f"The subject is what the {count} masks mark together."]
    raise ValueError(
        f"mask holds {count} masks, image {pictures} pictures; connect one mask for each picture, or one for all. "
        "Pictures with masks of their own can also be extracted one by one and joined with Combine MoMA Subjects."
    )


def _finite(values: Tensor, name: str) -> Tensor:
    values = values.detach().to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values; the node that made it failed (often a VAE in fp16).")
    return values


def _bytes(values: Tensor) -> np.ndarray:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


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


BLACK = 1
"""Levels (of 255) up to which a pixel is black."""
NEARLY = 4
"""Levels by which pixels of one colour may differ in each channel."""
ALL = 0.98
MOST = 0.95
HALF = 0.5
"""Shares of the pixels: edges are blurred."""
LOWEST, HIGHEST = -0.05, 5.0
"""A little outside of 0..1 are resized and decoded pictures; far above it, highlights of HDR pictures."""
FEW = 0.05

_SECOND = (
    "If you painted the mask in the mask editor, that saved black under the paint, as some versions do: load the "
    "original picture in a second Load Image, take `image` from that one and `mask` from the painted one."
)
_INVERT = (
    "If the picture is a cut-out with a transparent background, its mask marks the background: put Invert Mask in "
    "between."
)
WAYS_OUT = {
    "mask": (" where its mask marks the subject", f"{_SECOND} {_INVERT}"),
    "background": (" where its mask marks the subject", f"{_INVERT} {_SECOND}"),
    "alpha": (
        " where its transparency marks the subject",
        "Connect a mask that says where the subject is, and a picture that shows it there.",
    ),
    "nothing": ("", "Look at the node that it comes from."),
}
"""Where a subject is black, and what to do, by what marks it: a mask, a mask that looks as if it marked the background,
the picture's transparency, or nothing, so that it is the whole picture."""


def check_range(values: Tensor) -> None:
    """Refuse pictures [N, H, W, C] in another scale than 0..1.

    Raises:
        ValueError: More than a few values of a picture are far outside.
    """
    outside = ((values < LOWEST) | (values > HIGHEST)).flatten(1).float().mean(dim=1)
    if outside.max().item() > FEW:
        low, high = (value.item() for value in values.aminmax())
        raise ValueError(
            f"image holds values from {low:.4g} to {high:.4g}; expected 0 to 1 (0..255 and -1..1 are other scales). "
            "The node that made it works in another scale: bring the picture to 0..1 first."
        )


def check_content(colours: np.ndarray, cut: CutMask, marked_by: str, which: str) -> str | None:
    """What there is to say of a subject in which nothing can be seen; None if it has content.

    Args:
        colours: The picture [H, W, 3] uint8.
        cut: Its mask; stretched over the picture.
        marked_by: Where that mask is from, one of `WAYS_OUT`.
        which: Names the picture in a message: "" or " for picture 2 of 3".

    Raises:
        ValueError: The subject is black: the picture lost it. (Where a mask is soft, colours can be left at its edge.)
    """
    core, inside = (colours[_stretched(part, colours)] for part in (cut.core, cut.stencil > 0))
    if not (len(core) and len(inside)):
        return None
    if _black(core) >= ALL and _black(inside) >= HALF:
        where, way_out = WAYS_OUT[marked_by]
        raise ValueError(
            f"image is black{where}{which}. {way_out} (A subject that is pure black must be made a little lighter to "
            "be seen.)"
        )
    typical = np.median(inside, axis=0)
    if (np.abs(inside - typical).max(axis=1) <= NEARLY).mean() >= MOST:
        colour = ", ".join(str(round(value)) for value in typical)
        return (
            f"The subject is of one colour (RGB {colour}): the language model sees only its outline. If the picture "
            "shows more there, its colours were lost on the way, as in some mask editors: load it in a second Load "
            "Image and take `image` from that one."
        )
    return None


def _stretched(part: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A mask [h, w] bool at the size of a picture [H, W, 3]."""
    return np.asarray(Image.fromarray(part).resize(colours.shape[1::-1], Image.Resampling.NEAREST))


def _black(pixels: np.ndarray) -> float:
    """The share of pixels [n, 3] that are black."""
    return float((pixels.max(axis=1) <= BLACK).mean())
