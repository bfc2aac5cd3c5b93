"""Whether there is anything to see of a subject, before the language model is asked to look."""

import numpy as np
from PIL import Image
from torch import Tensor

from .reference_mask import CutMask

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
