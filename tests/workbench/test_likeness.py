"""The measure of likeness by colours."""

import numpy as np
import pytest

from workbench.likeness import colour_likeness

WHOLE = np.ones((8, 8), bool)


def plain(*colour: int) -> np.ndarray:
    return np.full((8, 8, 3), colour, np.uint8)


def test_a_subject_is_like_itself_whatever_is_around_it() -> None:
    left = WHOLE.copy()
    left[:, 4:] = False
    first, second = plain(200, 30, 90), plain(200, 30, 90)
    first[:, 4:], second[:, 4:] = 0, 255
    assert colour_likeness(first, left, second, left) == pytest.approx(1)
    assert colour_likeness(first, WHOLE, second, WHOLE) == pytest.approx(0.5)


def test_other_colours_are_not_and_near_ones_are_in_between() -> None:
    red, nearly, blue = plain(255, 0, 0), plain(255, 25, 0), plain(0, 0, 255)
    assert colour_likeness(red, WHOLE, blue, WHOLE) == 0
    # A bin is 51 wide: half of the way to the next one is half of the overlap.
    assert colour_likeness(red, WHOLE, nearly, WHOLE) == pytest.approx(1 - 25 / 51)


def test_it_asks_how_much_of_the_subject_has_a_colour_not_how_large_it_is() -> None:
    small = WHOLE.copy()
    small[2:] = False
    both = plain(0, 255, 0)
    both[:, 4:] = (255, 255, 255)
    assert colour_likeness(both, small, both, WHOLE) == pytest.approx(1)
    assert colour_likeness(both, WHOLE, plain(0, 255, 0), WHOLE) == pytest.approx(0.5)


def test_an_empty_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="mask of the subject is empty"):
        colour_likeness(plain(0, 0, 0), ~WHOLE, plain(0, 0, 0), WHOLE)
