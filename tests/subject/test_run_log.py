"""The log of finished runs: what it finds, how little it keeps, and that it never costs a picture."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.sampling.live_mask import Film, LiveMask
from comfyui_moma.moma_modules.sampling.settings import ImageTokens
from comfyui_moma.moma_modules.subject import run_log
from comfyui_moma.moma_modules.subject.run_log import CAPACITY, FILM_BYTES, FILM_SIDE, MOST_RUNS, FinishedRun
from comfyui_moma.nodes.mask import SubjectMask

from workbench.scene import masks_of, moma, negative, positive, sample, tiny_adapter, tiny_subject
from workbench.tiny_models import seeded

ONE_STEP = {"steps": 2, "last_step": 1}


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{**ONE_STEP, **kwargs})


def mask(model: Any, samples: torch.Tensor) -> torch.Tensor:
    """What MoMA Subject Mask gives."""
    return SubjectMask.execute(model, {"samples": samples}).args[0]


def latents(seed: int, batch: int = 1, size: int = 8) -> torch.Tensor:
    return seeded(seed, "samples", (batch, 4, size, size))


def finished(batch: int = 1, size: int = 8, frames: int = 7, value: float = 0.5) -> FinishedRun:
    masks = torch.full((1, batch, size, size), value)
    film = [(number + 1, (masks * 255).to(torch.uint8)) for number in range(frames)]
    return FinishedRun.of(("key",), masks, frames + 1, film)


def test_a_long_list_of_runs_is_held(model: Any, adapter: Any) -> None:
    subject = tiny_subject(adapter, seed=201)
    patched = moma(model, adapter, subject)
    first = run(patched, subject)
    expected = mask(patched, first)
    for seed in range(2, 66):
        run(patched, subject, seed=seed)
    assert torch.equal(mask(patched, first), expected) and float(expected.std()) > 0.05


def test_another_model_with_the_subject_knows_the_run(model: Any, adapter: Any, subject: Any) -> None:
    """ComfyUI lets go of MODEL and adapter and makes them anew; clones and other settings do not matter either."""
    samples = run(moma(model, adapter, subject), subject)
    for again in (moma(model, tiny_adapter(), subject), moma(model, adapter, subject, weight=0.3).clone()):
        assert torch.equal(mask(again, samples), mask(moma(model, adapter, subject), samples))
    stranger = moma(model, adapter, tiny_subject(adapter, seed=202))
    with pytest.raises(ValueError, match="latent is not the result of a sampler that ran with this model"):
        mask(stranger, samples)


def test_copies_parts_and_joined_batches_are_known(model: Any, adapter: Any, subject: Any) -> None:
    patched = moma(model, adapter, subject)
    batch, other = run(patched, subject, batch=3), run(patched, subject, seed=9)
    whole, single = mask(patched, batch), mask(patched, other)
    assert torch.equal(mask(patched, batch.clone().half()), whole)
    assert torch.equal(mask(patched, batch[1:2]), whole[1:2])  # Latent From Batch
    assert torch.equal(mask(patched, torch.cat([other, batch])), torch.cat([single, whole]))  # Latent Batch
    with pytest.raises(ValueError, match="latent is not the result"):
        mask(patched, torch.cat([other, latents(1)]))


def test_pictures_of_runs_with_other_steps_share_no_film() -> None:
    log = run_log.RunLog()
    log.record(latents(1), finished(frames=3))
    log.record(latents(2), finished(frames=5, value=0.25))
    found = log.find(torch.cat([latents(1), latents(2)]))
    assert found is not None and [number for number, _ in found.film] == [6]
    assert found.masks["key"].amax(dim=(1, 2)).tolist() == [0.5, 0.25]
    assert len(log.find(latents(1)).film) == 4


@pytest.mark.parametrize(("batch", "size"), [(1, 64), (64, 64), (1, 256), (16, 128)])
def test_what_is_kept_is_bounded_in_bytes(batch: int, size: int) -> None:
    """Also right after runs that are larger than all others together; the newest is always there."""
    log, gone = run_log.RunLog(), latents(0, batch, size)
    log.record(gone, finished(batch, size))
    for seed in range(1, 40):
        log.record(latents(seed, batch, size), finished(batch, size))
        assert log.nbytes <= CAPACITY and log.find(latents(seed, batch, size)) is not None
    assert log.nbytes == sum(run.masks.nbytes + run.film.nbytes for run, _ in log._runs.values())
    kept = finished(batch, size)
    assert kept.film.nbytes <= FILM_BYTES and kept.film.dtype == torch.uint8
    assert kept.film.numel() == 0 or max(kept.film.shape[-2:]) <= FILM_SIDE
    assert (log.find(gone) is None) == log.dropped(gone)
    huge = FinishedRun(("key",), torch.zeros(1, 1, 4096, 4096), 1, (), torch.zeros(0, dtype=torch.uint8))
    log.record(latents(77), huge)
    assert len(log) == 1 and log.find(latents(77)) is not None


def test_a_dropped_run_is_said_to_be_dropped(model: Any, adapter: Any) -> None:
    subject = tiny_subject(adapter, seed=203)
    patched = moma(model, adapter, subject)
    samples = run(patched, subject)
    for seed in range(MOST_RUNS):
        subject.runs.record(latents(1000 + seed), finished())
    assert len(subject.runs) == MOST_RUNS
    with pytest.raises(ValueError, match=f"latent is of a run whose mask was dropped: .* the last {MOST_RUNS} runs"):
        mask(patched, samples)
    again = run(patched, subject)
    assert torch.equal(again, samples) and mask(patched, samples).shape == (1, 64, 64)


def test_a_copy_of_a_subject_has_a_log_of_its_own(adapter: Any, subject: Any) -> None:
    subject.runs.record(latents(5), finished())
    twin = copy.deepcopy(subject)
    assert twin.key == subject.key and len(twin.runs) == 0 and len(subject.runs) > 0


def fail(*args: Any) -> Any:
    raise RuntimeError("no room")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda patch, subject: patch.setattr(type(subject.runs), "record", fail), "keeping the masks of this run"),
        (lambda patch, subject: patch.setattr(run_log, "_fingerprints", fail), "keeping the masks of this run"),
        (lambda patch, subject: patch.setattr(Film, "add", fail), "showing the subject mask"),
        (lambda patch, subject: patch.setattr(LiveMask, "show", fail), "showing the subject mask"),
    ],
)
def test_looking_never_costs_a_picture(
    model: Any,
    adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: Callable[[Any, Any], None],
    said: str,
) -> None:
    """Whatever fails while masks are shown or kept: the picture comes, and one warning says what failed and why."""
    from comfyui_moma.moma_modules.sampling.patching import settings_of
    from comfyui_moma.moma_modules.sampling.wrappers import patched

    subject = tiny_subject(adapter, seed=204)
    shown = settings_of(moma(model, adapter, subject)).with_subject(
        subject, adapter, image_tokens=ImageTokens(show_on="1")
    )
    ours = patched(model, shown)
    expected = run(ours, subject, steps=3, last_step=3)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        place(patch, subject)
        assert torch.equal(run(ours, subject, steps=3, last_step=3), expected)
    (warning,) = [record.getMessage() for record in caplog.records if "MoMA" in record.getMessage()]
    assert said in warning and warning.endswith("the picture is as it would be. RuntimeError: no room")
    assert masks_of(ours, run(ours, subject, seed=8))
