"""The probe that measures pictures, and how its readings become shares."""

from typing import Any

import pytest
import torch
from comfyui_moma.training import data, description, probe
from comfyui_moma.training.drawn import looks, measured_subjects
from comfyui_moma.training.painter import paint
from comfyui_moma.training.world import CLASSES
from torch.nn.functional import avg_pool2d

pytestmark = pytest.mark.newest


def _told(count: int) -> tuple[torch.Tensor, ...]:
    scenes = [data.scene_of(number) for number in range(count)]
    painted = [paint(scene) for scene in scenes]
    return (
        torch.stack([data.to_tensor(picture) for picture, _ in painted]),
        torch.tensor([description.names_of(scene) for scene in scenes]),
        torch.tensor([description.numbers_of(scene) for scene in scenes]),
        torch.stack([avg_pool2d(torch.from_numpy(mask).float()[None], 8)[0] for _, mask in painted]),
    )


def test_it_learns_what_is_seen_and_ignores_colours_under_a_material() -> None:
    torch.manual_seed(0)
    model = probe.Probe()
    pictures, names, numbers, covered = _told(16)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = probe.loss_of(model(pictures), names, numbers, covered)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    reading = model(pictures)
    assert reading.masks.shape == covered.shape
    made = names[:, list(description.NAMED).index("material")] > 0
    recoloured = numbers.clone()
    recoloured[made, :9] *= -1
    assert made.any()
    assert not torch.equal(recoloured, numbers)
    before, after = (probe.loss_of(reading, names, values, covered) for values in (numbers, recoloured))
    assert torch.equal(before, after)


def test_its_pictures_are_not_those_of_training() -> None:
    first = probe._Told(0, 4)[0][0]
    shown = {data.to_tensor(paint(data.scene_of(number))[0]).numpy().tobytes() for number in range(50)}
    assert first.numpy().tobytes() not in shown


def test_measured_subjects_are_held_out_and_of_all_classes() -> None:
    subjects = measured_subjects(16)
    assert all(subject.held_out for subject in subjects)
    assert {subject.name for subject in subjects} == set(CLASSES)
    assert measured_subjects(16) == subjects


def test_alike_readings_are_near_each_other() -> None:
    def reading(colour: float, kind: int) -> Any:
        named = {name: torch.zeros(1, len(among)) for name, among in description.NAMED.items()}
        named["class"][0, kind] = 8.0
        return probe.Reading(named, torch.full((1, 12), colour), torch.zeros(1, 16, 16))

    one, near, far, other = (looks(reading(*told)) for told in ((0.5, 0), (0.6, 0), (-0.5, 0), (0.5, 1)))
    assert torch.dist(one, near) < torch.dist(one, far)
    assert torch.dist(one, near) < torch.dist(one, other)
