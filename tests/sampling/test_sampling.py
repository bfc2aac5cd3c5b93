"""MoMA on a tiny real UNet through ComfyUI's real samplers."""

import gc
import weakref
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_shortcut, tiny_subject
from workbench.tiny_models import tiny_model


@pytest.fixture(scope="module")
def full(model: Any, adapter: Any, subject: Any) -> Any:
    """A model with both parts on it."""
    return moma(model, adapter, subject, shortcut=tiny_shortcut(start=0.05))


def found(mask: torch.Tensor) -> bool:
    """Whether a mask tells places apart. (Minimum or maximum may lie in the negative prompt's half.)"""
    return float(mask.min()) >= 0 and float(mask.max()) <= 1 and float(mask.std()) > 0.05


def test_both_parts_act_and_leave_a_mask(model: Any, adapter: Any, subject: Any, full: Any) -> None:
    plain = sample(model, positive(subject), negative())
    tokens_only = sample(moma(model, adapter, subject), positive(subject), negative())
    shortcut_only = sample(
        moma(model, adapter, subject, weight=None, shortcut=tiny_shortcut()), positive(subject), negative()
    )
    both = sample(full, positive(subject), negative())
    results = [plain, tokens_only, shortcut_only, both]
    assert all(result.isfinite().all() for result in results)
    for i, one in enumerate(results):
        assert all(not close(one, other, 1e-2) for other in results[i + 1 :])
    mask = masks_of(full, both)[subject.key]
    assert mask.shape == (1, 8, 8)
    assert found(mask)


def test_zero_weight_and_strength_are_the_unpatched_model_to_the_bit(model: Any, adapter: Any, subject: Any) -> None:
    off = moma(model, adapter, subject, weight=0.0, shortcut=tiny_shortcut(strength=0.0))
    assert torch.equal(
        sample(off, positive(subject), negative(), batch=2), sample(model, positive(subject), negative(), batch=2)
    )


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_strength_and_weight_scale_what_is_added(model: Any, adapter: Any, subject: Any, kind: str) -> None:
    """In the first evaluation, at the first layer: half as strong adds half as much."""

    def added(amount: float) -> torch.Tensor:
        parts = {"weight": amount} if kind == "attn2" else {"weight": None, "shortcut": tiny_shortcut(amount, start=0)}
        patched = moma(model, adapter, subject, **parts)
        slot = patched.model_options["transformer_options"]["patches_replace"][kind][("input", 1)]
        original, seen = slot.add_subjects, []

        def add_subjects(out: torch.Tensor, *args: Any) -> torch.Tensor:
            result = original(out, *args)
            seen.append(result - out)
            return result

        slot.add_subjects = add_subjects
        sample(patched, positive(subject), negative(), steps=1)
        return seen[0]

    whole, half = added(1.0), added(0.5)
    assert whole.abs().max() > 1e-2
    assert torch.allclose(half, 0.5 * whole, atol=1e-5)


@pytest.mark.parametrize("window", [{"start": 0.0, "end": 0.0}, {"region": torch.zeros(1, 4, 4)}])
def test_an_empty_window_is_off(model: Any, adapter: Any, subject: Any, window: dict[str, Any]) -> None:
    off = moma(model, adapter, subject, weight=None, shortcut=tiny_shortcut(**window))
    on = moma(model, adapter, subject, weight=None, shortcut=tiny_shortcut())
    # ddim_uniform's first sigma lies below the schedule's first, where a window that ends at 0 has closed.
    plain = sample(model, positive(subject), negative())
    assert close(sample(off, positive(subject), negative()), plain, 1e-6)
    assert not close(sample(on, positive(subject), negative()), plain, 1e-2)


def test_a_region_keeps_the_subject_out_of_the_rest(model: Any, adapter: Any, subject: Any) -> None:
    region = torch.zeros(1, 32, 32)
    region[..., 16:] = 1
    recorded: list[torch.Tensor] = []
    limited = moma(model, adapter, subject, weight=None, shortcut=tiny_shortcut(region=region))
    _spy_shortcut(limited, recorded)
    sample(limited, positive(subject), negative(), size=(16, 16), steps=1)
    added = recorded[0]  # first block: at the latent's own size
    half = added.view(added.shape[0], 16, 16, -1)
    assert float(half[:, :, :8].abs().max()) == 0
    assert float(half[:, :, 8:].abs().min(dim=-1).values.max()) > 0


def _spy_shortcut(model: Any, recorded: list[torch.Tensor]) -> None:
    """Record what the first block's self-attention patch adds."""
    patches = model.model_options["transformer_options"]["patches_replace"]["attn1"]
    patch = patches[("input", 1)]
    original = patch.add_subjects

    def add_subjects(out: torch.Tensor, *args: Any) -> torch.Tensor:
        after = original(out, *args)
        recorded.append(after - out)
        return after

    patch.add_subjects = add_subjects


def test_the_mask_of_the_last_evaluation_scales_the_next(model: Any, adapter: Any, subject: Any) -> None:
    recorded: list[torch.Tensor] = []
    patched = moma(model, adapter, subject, weight=None, shortcut=tiny_shortcut())
    _spy_shortcut(patched, recorded)
    one_step = sample(patched, positive(subject), negative(), steps=2, last_step=1, force_full_denoise=False)
    mask = masks_of(patched, one_step)[subject.key].flatten()
    recorded.clear()
    sample(patched, positive(subject), negative(), steps=2)
    first, second = recorded
    assert float(first.abs().amax(dim=-1).min()) > 0  # no mask yet: everywhere
    outside = mask == 0
    assert 0 < int(outside.sum()) < mask.numel()
    assert float(second[:, outside].abs().max()) == 0
    assert float(second[:, ~outside].abs().amax(dim=-1).min()) > 0


def test_separate_evaluations_equal_batched_ones(full: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = sample(full, positive(subject), negative(), batch=2)
    monkeypatch.setattr(full.model, "memory_required", lambda *_, **__: 1e18)
    separate = sample(full, positive(subject), negative(), batch=2)
    assert close(separate, batched)
    assert close(masks_of(full, separate)[subject.key], masks_of(full, batched)[subject.key])


def test_a_batch_equals_its_images_alone(full: Any, subject: Any) -> None:
    batch = sample(full, positive(subject), negative(), batch=2, seed=1)
    for i in range(2):
        alone = sample(full, positive(subject), negative(), seed=1 + i)
        assert close(batch[i : i + 1], alone)


@pytest.mark.parametrize("size", [(8, 16), (9, 13), (24, 8), (11, 8)])
def test_any_latent_size(full: Any, subject: Any, size: tuple[int, int]) -> None:
    samples = sample(full, positive(subject), negative(), size=size, steps=2)
    mask = masks_of(full, samples)[subject.key]
    assert samples.shape[-2:] == size and samples.isfinite().all()
    assert mask.shape == (1, *size) and found(mask)


def test_cfg_one_needs_no_negative(full: Any, model: Any, subject: Any) -> None:
    samples = sample(full, positive(subject), negative(), cfg=1.0)
    mask = masks_of(full, samples)[subject.key]
    assert not close(samples, sample(model, positive(subject), negative(), cfg=1.0), 1e-2)
    assert found(mask)


@pytest.mark.parametrize(("length", "other"), [(154, 77), (77, 154), (231, 154)])
def test_long_and_unequal_prompts(full: Any, subject: Any, length: int, other: int) -> None:
    """ComfyUI repeats the shorter prompt; the subject's tokens must still be found, batched or not."""
    late = positive(subject, length=length, tokens=(length - 20,))
    batched = sample(full, late, negative(length=other), steps=2)
    mask = masks_of(full, batched)[subject.key]
    assert batched.isfinite().all() and found(mask)
    full.model.memory_required, kept = (lambda *_, **__: 1e18), full.model.memory_required
    try:
        separate = sample(full, late, negative(length=other), steps=2)
    finally:
        full.model.memory_required = kept
    assert close(separate, batched)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "heun", "uni_pc", "lcm"])
def test_any_sampler(full: Any, model: Any, subject: Any, sampler: str) -> None:
    samples = sample(full, positive(subject), negative(), sampler=sampler, scheduler="karras")
    plain = sample(model, positive(subject), negative(), sampler=sampler, scheduler="karras")
    assert samples.isfinite().all() and not close(samples, plain, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler(full: Any, subject: Any, sampler: str) -> None:
    samples = sample(full, positive(subject), negative(), sampler=sampler, scheduler="normal")
    assert samples.isfinite().all()
    assert found(masks_of(full, samples)[subject.key])


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler(full: Any, subject: Any, scheduler: str) -> None:
    assert sample(full, positive(subject), negative(), sampler="euler", scheduler=scheduler).isfinite().all()


def test_img2img(full: Any, model: Any, subject: Any) -> None:
    samples = sample(full, positive(subject), negative(), denoise=0.5, steps=4)
    plain = sample(model, positive(subject), negative(), denoise=0.5, steps=4)
    assert samples.isfinite().all() and not close(samples, plain, 1e-2)


def test_the_input_model_stays_as_it_was(model: Any, adapter: Any, subject: Any) -> None:
    before = sample(model, positive(subject), negative())
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    sample(patched, positive(subject), negative())
    assert torch.equal(sample(model, positive(subject), negative()), before)
    assert model.get_attachment("moma") is None and not model.wrappers and not model.callbacks
    assert "patches_replace" not in model.model_options["transformer_options"]


def test_order_of_the_two_nodes_does_not_matter(model: Any, adapter: Any, subject: Any, full: Any) -> None:
    other = moma(model, adapter, subject, weight=None, shortcut=tiny_shortcut(start=0.05))
    other = moma(other, adapter, subject)
    assert torch.equal(sample(other, positive(subject), negative()), sample(full, positive(subject), negative()))


def test_applying_twice_is_applying_once(full: Any, adapter: Any, subject: Any) -> None:
    again = moma(moma(full, adapter, subject), adapter, subject, shortcut=tiny_shortcut(start=0.05))
    assert torch.equal(sample(again, positive(subject), negative()), sample(full, positive(subject), negative()))
    assert [len(again.get_wrappers(kind, "moma")) for kind in again.wrappers] == [1] * len(again.wrappers)


def test_runs_repeat_and_do_not_disturb_each_other(full: Any, model: Any, adapter: Any, subject: Any) -> None:
    first = sample(full, positive(subject), negative())
    weaker = moma(full, adapter, subject, weight=0.3)
    sample(weaker, positive(subject), negative(), size=(16, 8), batch=2)
    sample(full.clone(), positive(subject), negative(), cfg=1.0, seed=9)
    assert torch.equal(sample(full, positive(subject), negative()), first)


def test_an_interrupted_run_leaves_nothing(full: Any, subject: Any) -> None:
    expected = sample(full, positive(subject), negative())
    states: list[Any] = []

    def stop(step: int, *_: Any) -> None:
        for item in gc.get_objects():
            if type(item).__name__ == "RunState":
                states.append(weakref.ref(item))
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(full, positive(subject), negative(), callback=stop)
    gc.collect()
    assert states and all(state() is None for state in states)
    assert "moma" not in full.model_options["transformer_options"]
    assert torch.equal(sample(full, positive(subject), negative()), expected)


def test_a_prompt_without_the_subject_gets_the_features_everywhere(full: Any, model: Any, subject: Any) -> None:
    samples = sample(full, positive(), negative())
    assert not close(samples, sample(model, positive(), negative()), 1e-2)
    assert float(masks_of(full, samples)[subject.key].min()) == 1


def test_two_subjects(model: Any, adapter: Any, subject: Any) -> None:
    """Two subjects in two regions: each has a mask, and the second changes the picture."""
    from comfyui_moma.moma_modules.prompt.marks import mark_tokens

    other = tiny_subject(adapter, "dog", seed=15)
    prompt = mark_tokens(positive(subject), {other.key: (9,)})
    one = moma(model, adapter, subject, shortcut=tiny_shortcut())
    two = moma(one, adapter, other, shortcut=tiny_shortcut())
    samples = sample(two, prompt, negative())
    masks = masks_of(two, samples)
    assert set(masks) == {subject.key, other.key}
    assert not torch.equal(masks[subject.key], masks[other.key])
    assert not close(samples, sample(one, prompt, negative()), 1e-2)


def test_an_inpaint_checkpoint(adapter: Any, subject: Any) -> None:
    """A 9-channel UNet: the reference pass brings the extra channels itself."""
    wide = tiny_model(in_channels=9)
    wide.model.set_inpaint()
    patched = moma(wide, adapter, subject, shortcut=tiny_shortcut())
    samples = sample(patched, positive(subject), negative())
    assert samples.isfinite().all() and not close(samples, sample(wide, positive(subject), negative()), 1e-2)


def test_a_lora_reaches_the_reference_pass(model: Any, adapter: Any, subject: Any) -> None:
    """Patched weights change the keys and values of the reference."""
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    shape = model.model_state_dict()[key].shape
    lora = model.clone()
    lora.add_patches({key: ("diff", (torch.ones(shape),))})
    seen: list[torch.Tensor] = []
    for candidate in (model, lora):
        patched = moma(candidate, adapter, subject, weight=None, shortcut=tiny_shortcut())
        _watch_reference(patched, seen)
        sample(patched, positive(subject), negative(), steps=1)
    assert not close(seen[0], seen[1], 1e-2)


def _watch_reference(model: Any, seen: list[torch.Tensor]) -> None:
    patch = model.model_options["transformer_options"]["patches_replace"]["attn1"][("input", 1)]
    original = patch.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> Any:
        seen.append(forward.subjects[0].reference[0][0].clone())
        return original(out, q, k, forward, extra_options)

    patch.add_subjects = add_subjects


def test_computing_the_shortcut_only_where_it_acts_changes_nothing(
    model: Any, adapter: Any, subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU queries outside the mask are left out, on a GPU all are computed: the same picture."""
    from comfyui_moma.moma_modules.sampling import run

    region = torch.zeros(1, 16, 16)
    region[:, :8, :8] = 1
    limited = moma(model, adapter, subject, shortcut=tiny_shortcut(region=region))
    selected = sample(limited, positive(subject), negative(), size=(16, 16), batch=2)
    asked: list[bool] = []

    def all_queries(**settings: Any) -> Any:
        asked.append(settings["sparse_shortcut"])
        return forward(**{**settings, "sparse_shortcut": False})

    forward = run.Forward
    monkeypatch.setattr(run, "Forward", all_queries)
    dense = sample(limited, positive(subject), negative(), size=(16, 16), batch=2)
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    assert asked and set(asked) == {on_cpu}
    assert close(selected, dense, 1e-5)
