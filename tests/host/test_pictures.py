"""Pictures that explain, numbers of a study, and what can be seen of a mask while it evolves."""

from typing import Any

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.host.pictures import (
    GAP,
    OUTLINE,
    contact_sheet,
    coverage,
    film_strip,
    picture,
    what_was_seen,
)
from comfyui_moma.moma_modules.sampling.live_mask import FRAMES, Film
from comfyui_moma.moma_modules.sampling.study import parse_study


def square() -> torch.Tensor:
    """A mask [64, 64] with a square on it."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:48, 20:40] = True
    return mask


def test_the_preview_outlines_the_mask_and_shows_the_subject_on_white() -> None:
    mask = square()
    image = torch.full((64, 64, 3), 100, dtype=torch.uint8)
    seen = (what_was_seen(image[None], mask[None])[0] * 255).round().to(torch.uint8)
    assert seen.shape == (64, 128 + GAP, 3)
    left, right = seen[:, :64], seen[:, 64 + GAP :]
    outline = (left == torch.tensor(OUTLINE, dtype=torch.uint8)).all(dim=2)
    assert outline[16, 30] and outline[30, 20] and not outline[30, 30] and not outline[5, 5]
    assert (right[~mask] == 255).all() and (right[mask] == 100).all()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(64, "100% of the picture. That is nearly all"), (1, "2% of the picture. That is hardly"), (32, "50%")],
)
def test_a_bad_mask_is_said(rows: int, expected: str) -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:rows] = True
    text = coverage(mask[None])
    assert expected in text
    assert ("That is" in text) == (rows != 32)


def test_a_bad_mask_among_good_ones_is_said() -> None:
    masks = torch.stack([square(), torch.ones(64, 64, dtype=torch.bool)])
    assert coverage(masks).startswith("The masks cover 16%, 100% of the pictures. That is nearly all")


def test_a_sheet_has_every_picture_in_its_place() -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    rows = [[picture(torch.tensor(c).float().expand(8, 8, 3) / 255) for c in row] for row in colours]
    sheet = (contact_sheet(rows, ["a", "b"], ["", ""])[0] * 255).round().byte().numpy()
    for colour in (c for row in colours for c in row):
        assert (sheet == np.array(colour, np.uint8)).all(axis=2).sum() == 64


def test_a_strip_has_a_row_per_picture_and_a_frame_per_evaluation() -> None:
    frames = [("1", torch.zeros(2, 16, 16)), ("9", torch.ones(2, 16, 16))]
    strip = film_strip(frames)[0]
    white = int((strip > 0.99).all(dim=2).sum())
    dark = int((strip < 0.01).all(dim=2).sum())
    assert dark >= 2 * 128 * 128 and white >= 2 * 128 * 128


@pytest.mark.parametrize("count", [1, 7, 8, 50, 1000])
def test_a_film_stays_short_and_even(count: int) -> None:
    film = Film()
    for i in range(count):
        film.add(torch.full((1, 1, 2, 2), i / count))
    numbers = [number for number, _ in film.frames]
    assert film.count == count and 1 <= len(numbers) < FRAMES and numbers[0] == 1
    gaps = set(np.diff(numbers).tolist())
    assert len(gaps) <= 1
    assert all(int(frame.max()) == int((number - 1) / count * 255) for number, frame in film.frames)


def test_numbers_of_a_study() -> None:
    study = parse_study(" 0.4, 1,1.0 ", "0.5,", 4)
    assert study.strengths == (0.4, 1.0) and study.weights == (0.5,)


@pytest.mark.parametrize(
    ("strengths", "weights", "message"),
    [
        ("", "1", "strengths is empty. Write numbers from 0 to 2 separated by commas"),
        ("0.4; 1", "1", "strengths: '0.4; 1' is not a number. Write numbers from 0 to 2"),
        ("0.4", "1, four", "weights: 'four' is not a number. Write numbers from 0 to 3"),
        ("3", "1", "strengths: 3 is out of range"),
        ("nan", "1", "strengths: nan is out of range"),
        ("0.1, 0.2, 0.3", "1, 2", "3 x 2 = 6 pictures; at most 5 fit on a sheet. Remove some numbers."),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(strengths: str, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=".") as refusal:
        parse_study(strengths, weights, 5)
    assert message in str(refusal.value)


def test_a_sheet_takes_grey_and_transparent_pictures() -> None:
    from comfyui_moma.nodes.study import ContactSheet

    red = torch.tensor([1.0, 0.0, 0.0]).expand(1, 8, 8, 3)
    images = {
        "image0": torch.cat([red, torch.ones(1, 8, 8, 1)], dim=3),
        "image1": torch.full((1, 8, 8, 1), 0.2),
        "image2": red,
    }
    sheet, batch = ContactSheet.execute(images, "a, b, c", "").args[:2]
    assert torch.equal(batch[0], red[0]) and torch.equal(batch[2], red[0])
    assert torch.equal(batch[1], torch.full((8, 8, 3), 0.2))
    assert (sheet == torch.tensor([1.0, 0.0, 0.0])).all(dim=3).sum() == 2 * 64


def test_a_sheet_that_does_not_fill_is_refused() -> None:
    from comfyui_moma.nodes.study import ContactSheet

    images: dict[str, Any] = {"image0": torch.zeros(3, 8, 8, 3)}
    with pytest.raises(ValueError, match="images holds 3 pictures, which do not fill 2 columns and 2 rows"):
        ContactSheet.execute(images, "a, b", "")
    with pytest.raises(ValueError, match="images have different sizes: 8x8, 4x8"):
        ContactSheet.execute({**images, "image1": torch.zeros(1, 8, 4, 3)}, "", "")
    with pytest.raises(ValueError, match="^images holds no picture"):
        ContactSheet.execute({"image0": torch.zeros(0, 8, 8, 3)}, "", "")
