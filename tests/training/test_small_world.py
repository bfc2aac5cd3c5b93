"""The published small world draws its subjects: held-out ones, asked for in places and of materials.

Measured with the published files: distance 1.16 (the prompt alone, in eight pictures: 2.67), place, class and material
right in all 16 pictures, mask 0.87, shapes followed by 56 % (by files that had seen no pairs, 12 %). Each of these
fails: keys and values not projected (distance 1.42), the reference in noise (1.65), the mask inverted (1.96, and it
0.05), the picture at the end of the instruction (the material right in 10 of 16).
"""

from collections.abc import Callable, Sequence
from itertools import product
from statistics import fmean

import pytest
import torch
from comfyui_moma.moma_modules.host.folders import OWN_WEIGHTS
from comfyui_moma.training.drawn import Asked, Read, SmallWorld, Variant, measured_subjects
from comfyui_moma.training.probe import load
from comfyui_moma.training.quality import ENDS
from comfyui_moma.training.world import CLASSES, MATERIALS, PLACES

pytestmark = [pytest.mark.newest, pytest.mark.slow]


@pytest.fixture(scope="module")
def world() -> SmallWorld:
    torch.manual_seed(0)
    return SmallWorld(OWN_WEIGHTS, load(), measured_subjects(len(CLASSES)), seeds=1)


@pytest.fixture(scope="module")
def somewhere(world: SmallWorld) -> list[Read]:
    """One subject of each class in two places."""
    places = [(i, PLACES[(i + shift) % len(PLACES)]) for shift in (0, 3) for i in range(len(CLASSES))]
    return [read for i, place in places for read in world.draw(Asked(i, place, None))[1]]


def made_anew(world: SmallWorld, strength: float) -> list[Read]:
    """Each subject of two materials."""
    made = [(i, MATERIALS[(i + shift) % len(MATERIALS)]) for shift in (0, 2) for i in range(len(CLASSES))]
    asked = [Asked(i, None, material, Variant(strength=strength)) for i, material in made]
    return [read for each in asked for read in world.draw(each)[1]]


def mean(readings: Sequence[Read], what: str) -> float:
    return fmean(float(getattr(reading, what)) for reading in readings)


def test_the_subject_comes_through(somewhere: list[Read]) -> None:
    assert mean(somewhere, "distance") < 1.29, somewhere


def test_the_language_models_part_comes_through(world: SmallWorld) -> None:
    """What the image tokens bring by themselves."""
    alone = Variant(shortcut=False)
    drawn = [
        read for i in range(len(CLASSES)) for read in world.draw(Asked(i, PLACES[i % len(PLACES)], None, alone))[1]
    ]
    assert mean(drawn, "distance") < 2.55, drawn


def test_the_prompt_decides_where_and_what_it_is(somewhere: list[Read]) -> None:
    assert mean(somewhere, "aimed") > 0.8, somewhere
    assert mean(somewhere, "kind") > 0.9, somewhere


def test_the_found_mask_lies_on_the_subject(somewhere: list[Read]) -> None:
    overlaps = [reading.overlap for reading in somewhere if reading.overlap is not None]
    assert len(overlaps) == len(somewhere) and fmean(overlaps) > 0.7, somewhere


def test_the_shape_follows_the_reference(world: SmallWorld) -> None:
    """Of two references of a subject that differ in one number of its shape alone, from one end to the other."""

    def moved(read: Callable[[Asked], list[Read]]) -> float:
        """The change of what is read, with that of the reference."""
        found: dict[float, list[float]] = {end: [] for end in ENDS}
        for i, number, end in product(range(len(CLASSES)), (0, 1), ENDS):
            own = world.shape(i)
            shape = (end, own[1]) if number == 0 else (own[0], end)
            asked = Asked(i, PLACES[i % len(PLACES)], None, Variant(shape=shape))
            found[end] += [each.shapes[number] for each in read(asked)]
        low, high = (fmean(found[end]) for end in ENDS)
        return high - low

    drawn, painted = moved(lambda asked: world.draw(asked)[1]), moved(world.painted)
    assert drawn > 0.3 * painted, (drawn, painted)


def test_a_material_takes_the_place_of_the_colours(world: SmallWorld) -> None:
    made = made_anew(world, 0.4)
    assert mean(made, "aimed") > 0.8, made
    assert mean(made, "kind") > 0.9, made


def test_the_old_material_stays_at_full_strength(world: SmallWorld) -> None:
    made = made_anew(world, 1.0)
    assert mean(made, "aimed") < 0.2, made
    assert mean(made, "kind") > 0.9, made
