"""Batches of pictures and of frames: image i of a batch is what it would be alone, however the batch is cut."""

from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Window
from comfyui_moma.moma_modules.sampling.wrappers import patched

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut
from workbench.tiny_models import seeded

FRAMES = 6


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{"steps": 2, "sampler": "euler", **kwargs})


def context_windows(model: Any, length: int, overlap: int, schedule: str) -> Any:
    return ContextWindowsManualNode.execute(model, length, overlap, schedule, 1, False, "pyramid", 0, False)[0]


def recorded(patched: Any) -> list[list[int]]:
    """The frames of every forward, read off the rows' pixels."""
    frames: list[list[int]] = []
    slot = patched.model_options["transformer_options"]["patches_replace"]["attn2"][("input", 1)]
    original = slot.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> torch.Tensor:
        height, width = forward.size
        frames.append((forward.rows.pixels[:, 0, 0, 0] // (height * width)).tolist())
        return original(out, q, k, forward, extra_options)

    slot.add_subjects = add_subjects
    return frames


def test_context_windows_without_overlap_are_the_frames_alone(full: Any, subject: Any) -> None:
    """Three windows of two frames: each frame has its own noise, mask and region, as if it were run alone."""
    windowed = context_windows(full, 2, 0, "standard_static")
    frames = recorded(windowed)
    ours = run(windowed, subject, batch=FRAMES)
    assert {tuple(sorted(set(part))) for part in frames} >= {(0, 1)} and max(max(part) for part in frames) == FRAMES - 1
    masks = masks_of(windowed, ours)[subject.key]
    for i in range(FRAMES):
        alone = run(full, subject, seed=1 + i)
        assert close(ours[i : i + 1], alone)
        assert close(masks[i : i + 1], masks_of(full, alone)[subject.key])


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"])
def test_overlapping_context_windows(full: Any, model: Any, subject: Any, schedule: str) -> None:
    """Frames are evaluated alone by this UNet, so overlapping windows must agree with no windows at all."""
    windowed = context_windows(full, 4, 2, schedule)
    expected = run(full, subject, batch=FRAMES)
    ours = run(windowed, subject, batch=FRAMES)
    assert close(ours, expected)
    masks = masks_of(windowed, ours)[subject.key]
    assert masks.shape == (FRAMES, 8, 8) and close(masks, masks_of(full, expected)[subject.key])
    assert not close(ours, run(model, subject, batch=FRAMES), 1e-2)


def animated(model: Any, length: int) -> Any:
    """Sub-batches as AnimateDiff-Evolved makes them: options copied, `ad_params` set, conditionings sliced by frame."""
    clone = model.clone()

    def sliced(conds: Any, frames: list[int], total: int) -> Any:
        for cond in conds or ():
            values = {}
            for key, value in cond["model_conds"].items():
                per_frame = isinstance(value.cond, torch.Tensor) and value.cond.shape[0] == total
                values[key] = value._copy_with(value.cond[frames]) if per_frame else value
            yield {**cond, "model_conds": values}

    def in_windows(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, model_options: Any) -> Any:
        total = x.shape[0]
        out = [torch.zeros_like(x) for _ in conds]
        for start in range(0, total, length):
            frames = list(range(start, min(start + length, total)))
            options = {**model_options, "transformer_options": {**model_options["transformer_options"]}}
            options["transformer_options"]["ad_params"] = {"sub_idxs": frames, "full_length": total}
            parts = [None if cond is None else list(sliced(cond, frames, total)) for cond in conds]
            for whole, part in zip(out, executor(model, parts, x[frames], timestep[frames], options), strict=True):
                whole[frames] = part
        return out

    # The first wrapper is the outermost: windows are made around everything else.
    wrappers = clone.wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    clone.wrappers[WrappersMP.CALC_COND_BATCH] = {"animated": [in_windows], **wrappers}
    return clone


def test_animatediff_sub_batches(full: Any, subject: Any) -> None:
    windows = animated(full, 4)
    frames = recorded(windows)
    expected = run(full, subject, batch=FRAMES)
    ours = run(windows, subject, batch=FRAMES)
    assert sorted({max(part) for part in frames}) == [3, 5]
    assert close(ours, expected)
    assert close(masks_of(windows, ours)[subject.key], masks_of(full, expected)[subject.key])


class MotionModule(torch.nn.Module):
    """Looks across all frames, as AnimateDiff-Evolved's modules do, and fails on another number of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.unflatten(0, (-1, FRAMES)).mean(dim=1, keepdim=True).expand(-1, FRAMES, -1, -1, -1).flatten(
            0, 1
        )


def injected(model: Any) -> Any:
    """A motion module at the end of a block, put in for sampling."""
    block = model.model.diffusion_model.input_blocks[1]
    module = MotionModule()
    clone = model.clone()
    injection = PatcherInjection(lambda _: block.append(module), lambda _: block.__delitem__(-1))
    clone.set_injections("AnimateDiff", [injection])
    return clone


def test_the_reference_pass_goes_without_motion_modules(model: Any, full: Any, subject: Any) -> None:
    """With MoMA at zero the animation is the plain one; on, the reference is what it is without the modules."""
    moving = injected(model)
    before = len(model.model.diffusion_model.input_blocks[1])
    off = moma(moving, tiny_adapter(), subject, weight=0.0, shortcut=tiny_shortcut(strength=0.0))
    plain = run(moving, subject, batch=FRAMES)
    assert torch.equal(run(off, subject, batch=FRAMES), plain)
    ours = run(injected(full), subject, batch=FRAMES)
    assert not close(ours, plain, 1e-2) and not close(ours, run(full, subject, batch=FRAMES), 1e-2)
    fresh = run(moma(moving, tiny_adapter(), subject, shortcut=tiny_shortcut()), subject, batch=FRAMES)
    assert torch.equal(fresh, ours), "a kept reference pass must be the one that a fresh adapter gets"
    assert len(model.model.diffusion_model.input_blocks[1]) == before


def test_latent_batch_index(full: Any, subject: Any) -> None:
    """Latent From Batch: picture 2 of a batch of 3, made again alone, is the same picture."""
    latent = torch.zeros(3, 4, 8, 8)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 5)
        alone = comfy.sample.prepare_noise(latent[:1], 5, [2])
        options = (2, 7.5, "euler", "normal", positive(subject), negative())
        batch = comfy.sample.sample(full, noise, *options, latent, disable_pbar=True)
        again = comfy.sample.sample(full, alone, *options, latent[:1], disable_pbar=True)
    assert torch.equal(alone, noise[2:]) and close(again, batch[2:])


def regions(count: int) -> torch.Tensor:
    """[count, 8, 8]: column stripes, another one in each mask."""
    masks = torch.zeros(count, 8, 8)
    for i in range(count):
        masks[i, :, 2 * i : 2 * i + 2] = 1
    return masks


def with_region(model: Any, adapter: Any, subject: Any, region: torch.Tensor) -> Any:
    settings = settings_of(moma(model, adapter, subject, shortcut=tiny_shortcut(region=region)))
    part = ImageTokens(1.0, Window(region=region))
    return patched(model, settings.with_subject(subject, adapter, image_tokens=part))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_region_masks_of_any_count(model: Any, adapter: Any, subject: Any, count: int) -> None:
    """For three pictures: one mask for all, one each, fewer (they repeat) or more (the rest is not used)."""
    batch = run(with_region(model, adapter, subject, regions(count)), subject, batch=3)
    for i in range(3):
        own = regions(count)[i % count][None]
        assert close(batch[i : i + 1], run(with_region(model, adapter, subject, own), subject, seed=1 + i))


def test_region_masks_follow_the_frames_of_context_windows(model: Any, adapter: Any, subject: Any) -> None:
    region = seeded(81, "regions", (FRAMES, 8, 8)).sigmoid()
    each = with_region(model, adapter, subject, region)
    assert close(
        run(context_windows(each, 4, 2, "standard_static"), subject, batch=FRAMES), run(each, subject, batch=FRAMES)
    )
