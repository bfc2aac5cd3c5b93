"""MoMA and what is done with samplers: inpainting, two passes, split runs, several evaluations in a step or none."""

from itertools import pairwise
from typing import Any

import comfy.taesd.taesd
import pytest
import torch
from comfy.conds import CONDNoiseShape
from comfy.sd import VAE
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from torch.nn.functional import interpolate

import nodes
from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut
from workbench.tiny_models import seeded, seeded_weight, tiny_model

SPLIT = {"steps": 4, "sampler": "euler", "scheduler": "normal"}


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    return sample(model, positive(subject), negative(), **{"steps": 3, **kwargs})


def masks_used(full: Any) -> list[torch.Tensor]:
    """The factor that scales the shortcut in the first block, evaluation by evaluation [B, H, W]."""
    seen: list[torch.Tensor] = []
    slot = full.model_options["transformer_options"]["patches_replace"]["attn1"][("input", 1)]
    original = slot.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> torch.Tensor:
        seen.append(forward.self_factors[0].clone())
        return original(out, q, k, forward, extra_options)

    slot.add_subjects = add_subjects
    return seen


def right_half() -> torch.Tensor:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    return mask


@pytest.mark.parametrize("differential", [False, True])
def test_noise_mask(full: Any, model: Any, subject: Any, differential: bool) -> None:
    """What is not to be painted stays the given latent; the rest is another picture than without MoMA."""

    def prepared(other: Any) -> Any:
        return DifferentialDiffusion.execute(other)[0] if differential else other

    options = {"denoise": 0.8, "noise_mask": right_half(), "steps": 4}
    ours, theirs = run(prepared(full), subject, **options), run(prepared(model), subject, **options)
    given = 0.3 * seeded(1, "latent", (1, 4, 8, 8))
    assert torch.allclose(ours[..., :4], given[..., :4], atol=1e-4)
    assert not close(ours[..., 4:], theirs[..., 4:], 1e-2)
    assert float(masks_of(full, ours)[subject.key].std()) > 0.05


def test_differential_diffusion_in_either_order(full: Any, model: Any, adapter: Any, subject: Any) -> None:
    soft = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    options = {"denoise": 0.8, "noise_mask": soft, "steps": 4}
    before = moma(DifferentialDiffusion.execute(model)[0], adapter, subject, shortcut=tiny_shortcut())
    ours = run(DifferentialDiffusion.execute(full)[0], subject, **options)
    assert torch.equal(run(before, subject, **options), ours)
    assert not close(ours, run(full, subject, **options), 1e-2)


def test_inpaint_checkpoint(adapter: Any, subject: Any) -> None:
    """A 9-channel UNet with InpaintModelConditioning: MoMA at zero is the plain picture, on it is another one."""
    wide = tiny_model(in_channels=9)
    wide.model.set_inpaint()
    shapes = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    vae = VAE(sd={name: seeded_weight(91, name, tuple(weight.shape)) for name, weight in shapes.items()})
    pixels = seeded(91, "pixels", (1, 64, 64, 3)).sigmoid()
    with torch.inference_mode():
        prompts = nodes.InpaintModelConditioning().encode(
            positive(subject), negative(), pixels, vae, right_half()[0], True
        )[:2]
    on = moma(wide, adapter, subject, shortcut=tiny_shortcut())
    off = moma(wide, adapter, subject, weight=0.0, shortcut=tiny_shortcut(strength=0.0))
    plain, ours = (sample(candidate, *prompts, steps=2) for candidate in (wide, on))
    assert torch.equal(sample(off, *prompts, steps=2), plain)
    assert not close(ours, plain, 1e-2) and float(masks_of(on, ours)[subject.key].std()) > 0.05


@pytest.mark.parametrize("pictures", [1, 2])
def test_models_that_are_shown_pictures_beside_the_latent(adapter: Any, subject: Any, pictures: int) -> None:
    """InstructPix2Pix has one, IC-Light up to two: MoMA at zero is the plain picture, on it is another one."""
    wide = tiny_model(in_channels=4 + 4 * pictures)
    shown = seeded(92, "shown", (1, 4 * pictures, 8, 8))

    def extra_conds(**kwargs: Any) -> dict[str, Any]:
        return {**type(wide.model).extra_conds(wide.model, **kwargs), "c_concat": CONDNoiseShape(shown)}

    wide.add_object_patch("extra_conds", extra_conds)
    on = moma(wide, adapter, subject, shortcut=tiny_shortcut())
    off = moma(wide, adapter, subject, weight=0.0, shortcut=tiny_shortcut(strength=0.0))
    plain, ours = run(wide, subject), run(on, subject)
    assert torch.equal(run(off, subject), plain)
    assert not close(ours, plain, 1e-2) and float(masks_of(on, ours)[subject.key].std()) > 0.05


def test_hires_fix(full: Any, subject: Any) -> None:
    """Two samplers, two sizes, one patched MODEL: the second pass is what it is with a MODEL of its own."""
    small = run(full, subject)
    large = interpolate(small, size=(16, 16), mode="nearest-exact")
    options = (positive(subject), negative(), large)

    def second(model: Any) -> torch.Tensor:
        import comfy.sample

        noise = seeded(3, "second", (1, 4, 16, 16))
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 4, 7.5, "euler", "normal", *options, denoise=0.5, disable_pbar=True
            )

    after = second(full)
    fresh = moma(tiny_model(), tiny_adapter(), subject, shortcut=tiny_shortcut())
    assert torch.equal(after, second(fresh))
    assert masks_of(full, small)[subject.key].shape == (1, 8, 8)
    assert masks_of(full, after)[subject.key].shape == (1, 16, 16)
    assert torch.equal(run(full, subject), small)


def test_ksampler_advanced_in_two_parts(full: Any, model: Any, subject: Any) -> None:
    """Each part is a run: its first evaluation has no mask yet, so the features reach the whole picture in it."""
    used = masks_used(full)
    whole = run(full, subject, **SPLIT)
    in_one, used[:] = list(used), []
    first = run(full, subject, **SPLIT, last_step=2)
    second = _continued(full, subject, first)
    assert len(in_one) == len(used) == 4
    for step in (0, 1):
        assert torch.equal(used[step], in_one[step])
    assert float(in_one[2].min()) == 0 and float(used[2].min()) == 1
    assert not torch.equal(second, whole)
    # Without masks there is nothing to lose: the parts make the whole.
    plain = _continued(model, subject, run(model, subject, **SPLIT, last_step=2))
    assert close(plain, run(model, subject, **SPLIT), 1e-5)


def _continued(model: Any, subject: Any, latent: torch.Tensor) -> torch.Tensor:
    """KSampler (Advanced) from step 2 without added noise."""
    import comfy.sample

    inputs = (4, 7.5, "euler", "normal", positive(subject), negative(), latent)
    with torch.inference_mode():
        return comfy.sample.sample(model, torch.zeros_like(latent), *inputs, disable_noise=True, start_step=2)


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_skipped_steps(full: Any, model: Any, adapter: Any, subject: Any, node: Any) -> None:
    """Where nothing is skipped nothing changes; else fewer evaluations, one picture in both orders, and a mask."""

    def cached(other: Any, threshold: float) -> Any:
        return node.execute(other, threshold, 0.0, 1.0, False)[0]

    options = {**SPLIT, "steps": 8, "size": (16, 16)}
    evaluations = masks_used(full)
    expected = run(full, subject, **options)
    assert torch.equal(run(cached(full, 0.0), subject, **options), expected)
    assert len(evaluations) == 2 * options["steps"]
    evaluations.clear()
    after, before = cached(full, 3.0), moma(cached(model, 3.0), adapter, subject, shortcut=tiny_shortcut())
    ours = run(after, subject, **options)
    assert 2 <= len(evaluations) < options["steps"]
    assert torch.equal(run(before, subject, **options), ours)
    assert not close(ours, run(cached(model, 3.0), subject, **options), 1e-2)
    assert float(masks_of(after, ours)[subject.key].std()) > 0.05


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("heun", 5), ("dpmpp_2s_ancestral", 5), ("euler", 3), ("dpm_2", 5)]
)
def test_samplers_that_evaluate_several_times_per_step(
    full: Any, model: Any, subject: Any, sampler: str, evaluations: int
) -> None:
    """Every evaluation after the first is scaled by the mask of the one before it."""
    used = masks_used(full)
    samples = run(full, subject, sampler=sampler, scheduler="karras")
    assert len(used) == evaluations
    assert float(used[0].min()) == 1
    for before, after in pairwise(used):
        assert float(before.max()) <= 1 and not torch.equal(before, after)
    assert not close(samples, run(model, subject, sampler=sampler, scheduler="karras"), 1e-2)
