"""The published small world draws its subjects: held-out ones, asked for in places and of materials.

Measured with the published files, two draws of noise: distance 1.40 and 1.41 (the prompt alone: 2.65), place right
in 15 of 16 pictures, class and material in all, mask 0.81 and 0.79. Each of these fails: the picture at the end of the
instruction (distance 1.51), keys and values not projected (1.87), the reference in noise (1.89), the mask inverted
(2.13, and it 0.06).
"""

from collections.abc import Sequence
from statistics import fmean

import pytest
import torch
from comfyui_moma.moma_modules.host.folders import OWN_WEIGHTS
from comfyui_moma.training.drawn import Asked, Read, SmallWorld, Variant, measured_subjects
from comfyui_moma.training.probe import load
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


@pytest.fixture(scope="module")
def made_anew(world: SmallWorld) -> list[Read]:
    """Each of a material."""
    asked = [(i, MATERIALS[i % len(MATERIALS)]) for i in range(len(CLASSES))]
    return [read for i, material in asked for read in world.draw(Asked(i, None, material, Variant(strength=0.4)))[1]]


def mean(readings: Sequence[Read], what: str) -> float:
    return fmean(float(getattr(reading, what)) for reading in readings)


def test_the_subject_comes_through(somewhere: list[Read]) -> None:
    assert mean(somewhere, "distance") < 1.46, somewhere


def test_the_prompt_decides_where_and_what_it_is(somewhere: list[Read]) -> None:
    assert mean(somewhere, "aimed") > 0.8, somewhere
    assert mean(somewhere, "kind") > 0.9, somewhere


def test_the_found_mask_lies_on_the_subject(somewhere: list[Read]) -> None:
    overlaps = [reading.overlap for reading in somewhere if reading.overlap is not None]
    assert len(overlaps) == len(somewhere) and fmean(overlaps) > 0.7, somewhere


def test_a_material_takes_the_place_of_the_colours(made_anew: list[Read]) -> None:
    assert mean(made_anew, "aimed") > 0.8, made_anew
    assert mean(made_anew, "kind") > 0.9, made_anew
