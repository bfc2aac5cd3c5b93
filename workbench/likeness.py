"""How much of a subject is in a picture, by its colours: a measure that needs no network."""

from typing import Any

import numpy as np

_BINS = 6
"""A channel. Colours on the edge of two bins count for both by how near they are."""

Pixels = np.ndarray[Any, Any]


def colour_likeness(picture: Pixels, mask: Pixels, reference: Pixels, reference_mask: Pixels) -> float:
    """The overlap of two subjects' colour histograms, 0..1 (Swain and Ballard, Color indexing, 1991).

    Args:
        picture, reference: uint8 [H, W, 3], each of its own size.
        mask, reference_mask: [H, W], above 0.5 (or True) on the subject.

    Raises:
        ValueError: A mask is empty.
    """
    first, second = (_histogram(*pair) for pair in ((picture, mask), (reference, reference_mask)))
    return float(np.minimum(first, second).sum())


def _histogram(picture: Pixels, mask: Pixels) -> Pixels:
    colours = picture[mask > 0.5].astype(float) / 255 * (_BINS - 1)
    if not len(colours):
        raise ValueError("The mask of the subject is empty.")
    low = np.floor(colours).astype(int).clip(0, _BINS - 2)
    share = colours - low
    histogram = np.zeros((_BINS, _BINS, _BINS))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(np.array(corner) == 1, share, 1 - share), axis=1)
        np.add.at(histogram, tuple((low + corner).T), weight)
    return histogram / len(colours)
