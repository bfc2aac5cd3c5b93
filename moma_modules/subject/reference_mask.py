"""Masks as people have them (painted, JPEG, mattes, a picture's transparency) to a yes or no for each pixel."""

import functools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

DEFAULT_THRESHOLD = 0.5
"""Half-way between a mask's background and its subject."""
RELEASED = 0.0
"""The threshold that stands for the released code's rule: whatever is not black."""
FAINT = 0.1
"""Below this highest value a mask may be one in which nothing was found."""
NO_BACKGROUND = 0.75
"""Levels nearer to each other than this, as a ratio, are both the subject."""
OVERSHOOT = 1.5
"""Up to this highest value a mask is in 0..1, but was resized."""
OUTLIERS = 5
RARE = 0.1
"""Percent of the background's darkest and of the subject's brightest pixels, and of all pixels, that do not set the
levels."""
THIN = 5
"""Soft lines of less than this many pixels in width are kept down to half the threshold."""
MOST_OF_BORDER = 0.7
"""Who covers more than this of a picture's border is likely its background."""
BARELY = 0.01
"""Soft edges that are a smaller share of the picture are not worth a word."""
STRETCH = 0.02
"""By how much the aspect ratios of picture and mask may differ without a note."""


@dataclass(frozen=True)
class CutMask:
    """A mask after its cut.

    Attributes:
        stencil: [h, w] uint8: 0 outside; resized by the released rule, it gives the reference's mask.
        core: [h, w] bool: inside, and at least as bright as the subject's level.
        level: Values of the mask from here on are inside.
        soft: Share of the pixels that are neither black nor inside; 0 for a hard mask.
        highest: The mask's highest value.
    """

    stencil: np.ndarray
    core: np.ndarray
    level: float
    soft: float
    highest: float


def cut_mask(mask: Tensor, threshold: float = DEFAULT_THRESHOLD) -> CutMask:
    """Decide for each pixel of a mask [h, w] whether it is inside.

    The cut lies `threshold` of the way from the level of the mask's background to that of its subject, so it does not
    matter in which range the mask's values lie. Of a hard mask (0 and one other value) everything that is not 0 is
    inside, whatever the threshold, and the stencil has its bytes: resizing that is what the released code does. Soft
    lines that are thinner than `THIN` pixels are not lost: for them half the threshold counts.

    Args:
        threshold: 0 to 1; `RELEASED` takes whatever is not black.
    """
    values = mask.numpy()
    highest = float(values.max())
    if highest <= OVERSHOOT:
        values = np.minimum(values, 1)
    if round(min(highest, 1.0) * 255) <= 0:
        return CutMask(np.zeros(values.shape, np.uint8), np.zeros(values.shape, bool), 0.0, 0.0, highest)
    background, subject = _levels(values)
    level = background + threshold * (subject - background)
    bytes_ = (values.clip(0, 1) * 255).round().astype(np.uint8)
    if threshold == RELEASED:
        stencil = bytes_
    else:
        inside = values >= level
        if ((values < level) & (values > background)).any():
            inside |= _thin_lines(values) >= (level - background) / 2
        stencil = np.where(inside, np.uint8(max(round(min(subject, 1.0) * 255), 1)), np.uint8(0))
    outside = stencil == 0
    return CutMask(stencil, ~outside & (values >= subject), level, float((outside & (bytes_ > 0)).mean()), highest)


def mask_from_alpha(alpha: Tensor, which: str) -> tuple[Tensor, list[str]]:
    """The mask [h, w] that a picture's alpha channel [h, w] (1 opaque) stands for, and a note on how it was read.

    Two habits meet in ComfyUI. In a cut-out the subject is opaque. What Join Image with Alpha makes of a picture and a
    mask, and what the mask editor saves, is transparent on the subject. A background lies along the picture's border:
    if most of the border is opaque, the subject is the transparent part.

    Args:
        which: Names the picture in a message: "" or " for picture 2 of 3".

    Raises:
        ValueError: The picture is fully transparent.
    """
    opaque = cut_mask(alpha).stencil > 0
    if not opaque.any():
        raise ValueError(
            f"image is fully transparent{which}: nothing says where the subject is. Connect its mask to `mask`, or "
            "take the picture from Split Image with Alpha to use the whole of it."
        )
    if opaque.all():
        return alpha, []
    advice = "If it is the other way round, connect a mask."
    if covers_border(opaque):
        return 1 - alpha, [f"The subject is the picture's transparent part: what is opaque lies around it. {advice}"]
    return alpha, [f"The subject is the picture's opaque part, as in a cut-out. {advice}"]


def covers_border(inside: np.ndarray) -> bool:
    """Whether a mask [h, w] bool takes most of a picture's outermost pixels and leaves out something."""
    edge = np.concatenate([inside[0], inside[-1], inside[1:-1, 0], inside[1:-1, -1]])
    return bool(edge.mean() > MOST_OF_BORDER and not inside.all())


def mask_notes(cut: CutMask, picture: tuple[int, ...]) -> list[str]:
    """What the user should know of a mask that is used for a picture of this height and width; what matters first."""
    notes = []
    if 0 < cut.highest < FAINT:
        notes.append(
            f"The mask is faint, its highest value is {cut.highest:.2g}: if nothing was found in the picture, paint "
            "the subject."
        )
    if covers_border(cut.stencil > 0):
        notes.append(
            "The mask covers the picture's border and leaves out a part inside: if it marks the background, as Load "
            "Image's mask of a cut-out does, put Invert Mask in between."
        )
    height, width = cut.stencil.shape
    if abs(height * picture[1] - width * picture[0]) > STRETCH * height * picture[1]:
        notes.append(
            f"The mask ({width}x{height}) has another shape than the picture ({picture[1]}x{picture[0]}) and is "
            "stretched over it."
        )
    if cut.soft >= BARELY:
        notes.append(
            f"The mask is soft: it is cut at {cut.level:.2g}; {cut.soft:.0%} of it is fainter and left out "
            "(mask_threshold)."
        )
    return notes


def _levels(values: np.ndarray) -> tuple[float, float]:
    """The values of a mask's background and subject: near the lowest below Otsu's threshold, near the highest above.

    N. Otsu, "A threshold selection method from gray-level histograms", 1979: the split with the largest variance
    between its sides. Where a wide shadow outweighs a small subject, the split is below the shadow, but the brightest
    pixels are still the subject's. The background is 0 where the mask has none.
    """
    low, high = float(values.min()), float(values.max())
    if low >= NO_BACKGROUND * high:
        return 0.0, high
    counts, edges = np.histogram(values, 256, (low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    below, weighted = np.cumsum(counts)[:-1], np.cumsum(counts * middles)[:-1]
    total, whole = counts.sum(), (counts * middles).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (whole * below / total - weighted) ** 2 / (below * (total - below))
    split = edges[1 + int(np.nanargmax(between))]
    lower, upper = values[values < split], values[values >= split]
    background = float(min(np.percentile(lower, OUTLIERS), np.percentile(values, RARE)))
    subject = float(max(np.percentile(upper, 100 - OUTLIERS), np.percentile(values, 100 - RARE)))
    return (0.0, subject) if background >= NO_BACKGROUND * subject else (background, subject)


def _thin_lines(values: np.ndarray) -> np.ndarray:
    """How much each pixel of [h, w] stands out from what is at least `THIN` pixels wide (a morphological top-hat)."""
    opened = values
    for pick in (np.minimum, np.maximum):
        for axis in (0, 1):
            padded = np.pad(opened, [(THIN // 2, THIN // 2) if axis == i else (0, 0) for i in (0, 1)], "edge")
            shifted = np.lib.stride_tricks.sliding_window_view(padded, THIN, axis)
            opened = functools.reduce(pick, np.moveaxis(shifted, -1, 0))
    return values - opened
