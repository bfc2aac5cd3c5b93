"""Pictures and masks as a measure sees them: the whole, the subject alone against white, what is around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..table import RowError
from .samples import Sample

Pixels = np.ndarray[Any, Any]
"""uint8 [H, W, 3]; of masks bool [H, W]."""

MARGIN = 0.05
"""White around the subject's box, as a share of the box's longer side."""
LEAST_AROUND = 0.1
"""Of a picture that must be outside of the subject's box for its background to be judged."""


@dataclass(frozen=True)
class Views:
    """What is measured of one picture with its mask.

    Attributes:
        whole: The picture.
        subject: The subject alone, white elsewhere, cut to a square around its box; None without a mask. All white if
            the mask is empty: there is no subject.
        around: The picture with the subject's box painted in the mean colour of the rest, so that neither the subject
            nor its outline is in it; None without a mask, or if less than `LEAST_AROUND` is left.
    """

    whole: Image.Image
    subject: Image.Image | None
    around: Image.Image | None


def views(picture: Pixels, mask: Pixels | None) -> Views:
    """A picture with its mask, cut up."""
    whole = Image.fromarray(picture)
    if mask is None:
        return Views(whole, None, None)
    if not mask.any():
        return Views(whole, Image.new("RGB", whole.size, "white"), whole)
    top, bottom, left, right = _box(mask)
    alone = np.where(mask[..., None], picture, np.uint8(255))[top:bottom, left:right]
    side = round(max(alone.shape[:2]) * (1 + 2 * MARGIN))
    square = Image.new("RGB", (side, side), "white")
    square.paste(Image.fromarray(alone), ((side - alone.shape[1]) // 2, (side - alone.shape[0]) // 2))
    outside = np.ones(mask.shape, bool)
    outside[top:bottom, left:right] = False
    if outside.mean() < LEAST_AROUND:
        return Views(whole, square, None)
    around = picture.copy()
    around[~outside] = picture[outside].mean(axis=0).round().astype(np.uint8)
    return Views(whole, square, Image.fromarray(around))


def _box(mask: Pixels) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def load_picture(path: Path) -> tuple[Pixels, Pixels | None]:
    """A picture, and the mask that its transparency stands for.

    Of a picture whose border is mostly opaque the transparent part is the subject, as the mask editor saves it; else
    the opaque part, as in a cut-out.

    Raises:
        RowError: It cannot be read.
    """
    opened = _open(path)
    if "A" not in opened.getbands() and "transparency" not in opened.info:
        return np.asarray(opened.convert("RGB")), None
    pixels = np.asarray(opened.convert("RGBA"))
    opaque = pixels[..., 3] >= 128
    if opaque.all() or not opaque.any():
        return pixels[..., :3].copy(), None
    edge = np.concatenate([opaque[0], opaque[-1], opaque[1:-1, 0], opaque[1:-1, -1]])
    return pixels[..., :3].copy(), ~opaque if edge.mean() > 0.7 else opaque


def load_mask(path: Path, size: tuple[int, int]) -> Pixels:
    """A mask, white on the subject, at a picture's height and width.

    Raises:
        RowError: It cannot be read.
    """
    opened = _open(path).convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(opened) >= 128


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise RowError(f"{path} cannot be read as a picture: {error}") from error


def reference_views(sample: Sample) -> Views:
    """The views of a sample's reference.

    Raises:
        RowError: A file cannot be read, or the mask is empty.
    """
    picture, mask = load_picture(sample.reference)
    if sample.reference_mask is not None:
        mask = load_mask(sample.reference_mask, picture.shape[:2])
    if mask is not None and not mask.any():
        raise RowError(f"reference: the mask of {sample.reference} is empty")
    return views(picture, mask)


def picture_views(sample: Sample) -> tuple[Views, dict[str, float]]:
    """The views of a sample's picture, and the figures of its mask that need no network; see `mask_figures`.

    Raises:
        RowError: A file cannot be read.
    """
    picture, _ = load_picture(sample.picture)
    mask = load_mask(sample.mask, picture.shape[:2]) if sample.mask is not None else None
    if mask is None:
        return views(picture, None), {}
    true = load_mask(sample.true_mask, mask.shape) if sample.true_mask is not None else None
    return views(picture, mask), mask_figures(mask, true)


def mask_figures(mask: Pixels, true: Pixels | None) -> dict[str, float]:
    """What is known of a mask by itself.

    Returns:
        `mask area`: its share of the picture; `mask in one piece`: of it the share of its largest connected part;
        `mask IoU`, where the true mask is known: the overlap of both.
    """
    from scipy.ndimage import label

    found = {"mask area": float(mask.mean())}
    parts, count = label(mask)
    found["mask in one piece"] = float(np.bincount(parts[mask]).max() / mask.sum()) if count else 0.0
    if true is not None:
        either = (mask | true).sum()
        found["mask IoU"] = float((mask & true).sum() / either) if either else 1.0
    return found
