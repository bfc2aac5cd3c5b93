"""Nothing switches MoMA off silently: whatever another node takes off the MODEL is put back, or the run says what."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfyui_moma.moma_modules.sampling import guard
from comfyui_moma.moma_modules.sampling.patching import settings_of
from compat_rows import message

from workbench.scene import masks_of, moma, negative, positive, run, tiny_shortcut

OURS = "moma"
KINDS = ("outer_sample", "sampler_sample", "predict_noise", "calc_cond_batch", "apply_model")


def passed_through(executor: Any, *args: Any, **kwargs: Any) -> Any:
    return executor(*args, **kwargs)


def replace_kinds(*kinds: str) -> Callable[[Any], None]:
    """As BrushNet and PowerPaint do it: the wrappers of whole kinds give way to the pack's own."""
    return lambda model: model.wrappers.update({kind: {None: [passed_through]} for kind in kinds})


def no_wrappers(model: Any) -> None:
    model.wrappers = {}


def no_slots(model: Any) -> None:
    model.model_options["transformer_options"]["patches_replace"] = {}


def own_slots(model: Any) -> None:
    """A fresh dict with the pack's own replacement in one slot."""

    def halved(q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])

    model.model_options["transformer_options"]["patches_replace"] = {"attn2": {("input", 1): halved}}


def new_options(model: Any) -> None:
    model.model_options["transformer_options"] = {}


def no_attachments(model: Any) -> None:
    model.attachments = {}


def no_callbacks(model: Any) -> None:
    model.callbacks.update({kind: {} for kind in (CallbacksMP.ON_CLONE, CallbacksMP.ON_PRE_RUN)})


def no_additional_models(model: Any) -> None:
    model.additional_models = {}


def all_but(keep: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Everything of ours goes but one part."""

    def removal(model: Any) -> None:
        kept = keep(model)
        no_wrappers(model)
        new_options(model)
        no_attachments(model)
        no_callbacks(model)
        no_additional_models(model)
        kept()

    return removal


REMOVALS: dict[str, tuple[Callable[[Any], None], str]] = {
    **{f"wrappers of kind {kind}": (replace_kinds(kind), f"the wrapper {kind}") for kind in KINDS},
    "wrappers of BrushNet's kinds": (replace_kinds("outer_sample", "apply_model"), "the wrapper apply_model"),
    "all wrappers": (no_wrappers, "the wrapper predict_noise"),
    "slots": (no_slots, "the attention patches"),
    "slots, for others": (own_slots, "the attention patches"),
    "transformer options": (new_options, "the start in the transformer options"),
    "attachments": (no_attachments, "the settings"),
    "callbacks": (no_callbacks, "the callback on_clone"),
    "additional models": (no_additional_models, "the adapter"),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_what_is_taken_off_is_put_back_and_named(
    full: Any, subject: Any, expected: torch.Tensor, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    removal, words = REMOVALS[name]
    poorer = full.clone()
    removal(poorer)
    things = (poorer.wrappers, poorer.attachments, poorer.callbacks, poorer.additional_models)
    before = [sorted(map(str, part)) for part in things]
    with caplog.at_level("WARNING"):
        samples = run(poorer, subject)
    assert torch.equal(samples, expected)
    assert f"{words}" in caplog.text and message("BrushNet, PowerPaint after MoMA") in caplog.text
    assert float(masks_of(full, samples)[subject.key].std()) > 0.05
    assert [sorted(map(str, part)) for part in things] == before, "the MODEL itself is left as the other node made it"


def test_it_is_said_where_the_root_logger_is_off(full: Any, subject: Any, caplog: pytest.LogCaptureFixture) -> None:
    """UltimateSDUpscale turns it off while it works."""
    caplog.set_level(logging.CRITICAL + 1)
    caplog.handler.setLevel(logging.NOTSET)
    poorer = full.clone()
    no_attachments(poorer)
    run(new_options_from(WrappersMP.PREDICT_NOISE, FRESH["empty"])(poorer), subject, steps=1)
    assert "took the settings of MoMA off this model" in caplog.text
    assert "another node gives the model options of its own" in caplog.text


def test_nothing_is_said_where_nothing_is_missing(
    full: Any, subject: Any, expected: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        assert torch.equal(run(full.clone(), subject), expected)
    assert "MoMA" not in caplog.text


def test_the_adapter_is_loaded_all_the_same(full: Any, subject: Any) -> None:
    poorer = full.clone()
    no_additional_models(poorer)
    comfy.model_management.unload_all_models()
    loaded: list[Any] = []

    def look(*_: Any) -> None:
        loaded.extend(item.model.model for item in comfy.model_management.current_loaded_models)

    handle = poorer.model.diffusion_model.register_forward_pre_hook(look)
    run(poorer, subject)
    handle.remove()
    assert any(model is settings_of(full).subjects[0].adapter.module for model in loaded)


def test_the_adapter_is_loaded_together_with_the_unet(full: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it could push the UNet off a tight card; and what sampling needs stays free."""
    calls: list[tuple[list[Any], float]] = []

    def load(models: list[Any], memory_required: float = 0) -> None:
        calls.append((models, memory_required))
        comfy.model_management.load_models_gpu(models, memory_required=memory_required)

    monkeypatch.setattr(guard, "load_models_gpu", load)
    poorer = full.clone()
    no_additional_models(poorer)
    run(poorer, subject)
    ((models, memory),) = calls
    assert [model.model for model in models] == [full.model, settings_of(full).subjects[0].adapter.module]
    assert memory == full.model.memory_required([2, 4, 8, 8])


@pytest.mark.parametrize("left", ["callbacks", "slots"])
def test_where_only_a_witness_is_left_the_run_is_refused(full: Any, subject: Any, left: str) -> None:
    """Without the start of a run nothing can be put back; what is left says so before the first step ends."""
    poorer = full.clone()
    callbacks, slots = dict(poorer.callbacks), poorer.model_options["transformer_options"]["patches_replace"]

    def keep(model: Any) -> Callable[[], None]:
        def back() -> None:
            if left == "callbacks":
                model.callbacks = callbacks
            else:
                model.model_options["transformer_options"]["patches_replace"] = slots

        return back

    all_but(keep)(poorer)
    with pytest.raises(ValueError, match="^MoMA: another node took MoMA's wrappers off this model") as raised:
        run(poorer, subject)
    assert "BrushNet and PowerPaint" in str(raised.value)


def test_without_all_of_it_the_model_is_a_fresh_one(model: Any, full: Any, subject: Any) -> None:
    bare = full.clone()
    all_but(lambda _: lambda: None)(bare)
    assert torch.equal(run(bare, subject), run(model, subject)) and settings_of(bare) is None


@pytest.mark.parametrize("removal", [no_attachments, no_wrappers, new_options])
def test_a_node_after_the_loss_finds_what_was_there(
    model: Any, adapter: Any, subject: Any, expected: torch.Tensor, removal: Callable[[Any], None]
) -> None:
    """Apply MoMA Adapter, another node, Self-Attn Shortcut: the image tokens are not forgotten."""
    poorer = moma(model, adapter, subject).clone()
    removal(poorer)
    again = moma(poorer, adapter, subject, weight=None, shortcut=tiny_shortcut())
    assert torch.equal(run(again, subject), expected)


def test_options_may_be_copied_deeply(full: Any, subject: Any, expected: torch.Tensor) -> None:
    """On the MODEL (AutomaticCFG does that) and during a run."""
    copied = full.clone()
    copied.model_options = deepcopy(copied.model_options)
    assert torch.equal(run(copied, subject), expected)
    assert torch.equal(run(new_options_from(WrappersMP.PREDICT_NOISE, deepcopy)(full), subject), expected)


def new_options_from(
    kind: str, fresh: Callable[[dict[str, Any]], dict[str, Any]], inner: bool = False
) -> Callable[[Any], Any]:
    """A node whose wrapper, around ours or below it, hands other model options on in a run that began as it should."""

    def in_sampler(executor: Any, guider: Any, sigmas: Any, extra_args: Any, *args: Any) -> Any:
        other = {**extra_args, "model_options": fresh(extra_args["model_options"])}
        return executor(guider, sigmas, other, *args)

    def in_prediction(executor: Any, x: Any, timestep: Any, model_options: Any, seed: Any) -> Any:
        return executor(x, timestep, fresh(model_options), seed)

    wrapper = {WrappersMP.SAMPLER_SAMPLE: in_sampler, WrappersMP.PREDICT_NOISE: in_prediction}[kind]

    def add(model: Any) -> Any:
        clone = model.clone()
        # The first wrapper is the outermost.
        before = clone.wrappers.get(kind, {})
        clone.wrappers[kind] = {**before, "other": [wrapper]} if inner else {"other": [wrapper], **before}
        return clone

    return add


FRESH: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "empty": lambda options: {"transformer_options": {}},
    "without our state": lambda options: {
        **options,
        "transformer_options": {k: v for k, v in options["transformer_options"].items() if k != OURS},
    },
    "without wrappers": lambda options: {
        **options,
        "transformer_options": {**options["transformer_options"], "wrappers": {}},
    },
    "without slots": lambda options: {
        **options,
        "transformer_options": {**options["transformer_options"], "patches_replace": {}},
    },
    "without the slots of self-attention": lambda options: without_self_attention(options),
}


def without_self_attention(options: dict[str, Any]) -> dict[str, Any]:
    inner = options["transformer_options"]
    slots = {"attn2": inner["patches_replace"]["attn2"]}
    return {**options, "transformer_options": {**inner, "patches_replace": slots}}


@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("kind", [WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE])
def test_options_that_are_made_anew_during_a_run(
    full: Any, subject: Any, expected: torch.Tensor, caplog: pytest.LogCaptureFixture, kind: str, fresh: str
) -> None:
    with caplog.at_level("WARNING"):
        assert torch.equal(run(new_options_from(kind, FRESH[fresh])(full), subject), expected)
    assert "another node gives the model options of its own, without MoMA in them" in caplog.text


INNER = {
    "empty": "another node samples with options of its own",
    "without our state": "another node took MoMA's wrappers off this model",
    "without wrappers": "another node samples with options of its own",
    "without slots": "another node runs this model without its attention layers",
}


@pytest.mark.parametrize("fresh", INNER)
def test_options_that_are_made_anew_within_an_evaluation_are_refused(full: Any, subject: Any, fresh: str) -> None:
    """Below our wrapper nothing can be put back."""
    with pytest.raises(ValueError, match=f"^MoMA: {INNER[fresh]}"):
        run(new_options_from(WrappersMP.PREDICT_NOISE, FRESH[fresh], inner=True)(full), subject)


def test_a_guider_with_options_of_its_own_is_refused(full: Any, subject: Any) -> None:
    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            return super().predict_noise(x, timestep, {"transformer_options": {}}, seed)

    with pytest.raises(ValueError, match="^MoMA: another node samples with options of its own"):
        guided(Guider(full), subject)


def guided(guider: Any, subject: Any) -> torch.Tensor:
    """Two steps of euler."""
    guider.set_conds(positive(subject), negative())
    guider.set_cfg(7.5)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True)


def test_a_shortcut_that_is_taken_away_within_an_evaluation_is_said(
    full: Any, subject: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        run(new_options_from(WrappersMP.PREDICT_NOISE, without_self_attention, inner=True)(full), subject)
    assert "no forward of this run came to MoMA's patches in all self-attention layers" in caplog.text


def other_prompts(model: Any, scale: int) -> Any:
    """A node that evaluates prompts of its own, `scale` times as large as the run's."""

    def wrapper(executor: Any, unet: Any, conds: Any, x: Any, timestep: Any, options: Any) -> Any:
        bare = [
            [
                {**cond, "model_conds": {k: v for k, v in cond["model_conds"].items() if not k.startswith(OURS)}}
                for cond in part
            ]
            for part in conds
        ]
        large = x.repeat(1, 1, scale, scale)
        return [out[..., : x.shape[-2], : x.shape[-1]] for out in executor(unet, bare, large, timestep, options)]

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "other", wrapper)
    return clone


def test_prompts_of_another_size_only_are_refused(full: Any, subject: Any) -> None:
    with pytest.raises(ValueError, match="^MoMA: another node samples with options of its own"):
        run(other_prompts(full, 2), subject)


def test_prompts_of_another_node_are_said_once(full: Any, subject: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        run(other_prompts(full, 1), subject)
    assert caplog.text.count(message("Dual Model CFG Guider")) == 1


COPIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "copied": comfy.model_patcher.create_model_options_clone,
    "copied deeply": deepcopy,
}


def halved(q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"]) / 2


def in_the_batch(copied: Callable[[dict[str, Any]], dict[str, Any]], extra: bool) -> Callable[[Any], Any]:
    """`sampler_calc_cond_batch_function` with copied options; `extra`: first a call with another patch in a slot."""

    def calc(args: dict[str, Any]) -> Any:
        inputs = (args["model"], args["conds"], args["input"], args["sigma"])
        options = copied(args["model_options"])
        if extra:
            weaker = comfy.model_patcher.set_model_options_patch_replace(options.copy(), halved, "attn2", "input", 2)
            comfy.samplers.calc_cond_batch(*inputs, weaker)
        return comfy.samplers.calc_cond_batch(*inputs, options)

    def add(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_sampler_calc_cond_batch_function(calc)
        return clone

    return add


@pytest.mark.parametrize("place", ["PREDICT_NOISE", "the batch", "the batch, with an extra call before"])
@pytest.mark.parametrize("copied", COPIES)
def test_options_may_be_copied_within_an_evaluation(
    full: Any, subject: Any, expected: torch.Tensor, caplog: pytest.LogCaptureFixture, place: str, copied: str
) -> None:
    """The masks are found all the same; an extra call with another patch feeds none."""
    copy = COPIES[copied]
    nodes = {
        "PREDICT_NOISE": new_options_from(WrappersMP.PREDICT_NOISE, copy, inner=True),
        "the batch": in_the_batch(copy, extra=False),
        "the batch, with an extra call before": in_the_batch(copy, extra=True),
    }
    patched = nodes[place](full)
    with caplog.at_level("WARNING"):
        samples = run(patched, subject)
    assert torch.equal(samples, expected) and "MoMA" not in caplog.text
    assert torch.equal(masks_of(patched, samples)[subject.key], masks_of(full, expected)[subject.key])


def test_a_run_without_any_mask_says_so(full: Any, subject: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A patch around one of ours makes every call look like an extra one."""

    def around(options: dict[str, Any]) -> dict[str, Any]:
        slot = options["transformer_options"]["patches_replace"]["attn2"][("input", 2)]

        def patch(*args: Any) -> Any:
            return slot(*args)

        return comfy.model_patcher.set_model_options_patch_replace(options.copy(), patch, "attn2", "input", 2)

    with caplog.at_level("WARNING"):
        patched = new_options_from(WrappersMP.PREDICT_NOISE, around, inner=True)(full)
        samples = run(patched, subject)
    assert "no evaluation of this run gave a subject mask" in caplog.text
    assert bool((masks_of(patched, samples)[subject.key] == 1).all())


def test_a_sampler_of_another_pack_without_our_wrapper_is_refused(full: Any, subject: Any) -> None:
    """A guider that never calls ComfyUI's inner sampling, but the model."""

    class Guider(comfy.samplers.CFGGuider):
        def inner_sample(self, noise: Any, latent_image: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
            self.conds = comfy.samplers.process_conds(self.inner_model, noise, self.conds, device, latent_image)
            return self(noise, torch.tensor([1.0]), self.model_options)

    guider = Guider(full)
    guider.set_conds(positive(subject), negative())
    guider.set_cfg(7.5)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])
    with torch.inference_mode(), pytest.raises(ValueError, match="^MoMA: another node samples with options of its own"):
        guider.sample(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True)


def test_models_that_share_patches_are_told_so(full: Any, subject: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Without ON_CLONE what is added to one clone is added to all of them: each of their runs says it."""
    poorer = full.clone()
    no_callbacks(poorer)
    clone = poorer.clone()
    slots = [m.model_options["transformer_options"]["patches_replace"]["attn2"][("input", 1)] for m in (poorer, clone)]
    assert slots[0] is slots[1]
    for model in (poorer, clone):
        caplog.clear()
        run(model, subject, steps=1)
        assert "what IPAdapter adds to one of them acts on the others too" in caplog.text
    caplog.clear()
    run(full, subject, steps=1)
    assert "IPAdapter" not in caplog.text


def test_options_that_are_made_anew_before_sampling(full: Any, subject: Any, expected: torch.Tensor) -> None:
    """Another start of a run, below ours, drops all options: nothing of ours is asked again, and the run says so."""

    def outer(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        kept, guider.model_options = guider.model_options, {"transformer_options": {}}
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = kept

    other = full.clone()
    other.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "other", outer)
    with pytest.raises(ValueError, match="^MoMA: another node samples with options of its own"):
        run(other, subject)
    assert torch.equal(run(full, subject), expected)


def wrapped(options: dict[str, Any]) -> dict[str, Any]:
    """Some slots taken by what calls the patch that was there."""

    def around(patch: Any) -> Callable[..., torch.Tensor]:
        return lambda *args: patch(*args)

    slots = options["transformer_options"]["patches_replace"]
    for kind in ("attn1", "attn2"):
        patch = around(slots[kind][("input", 2)])
        options = comfy.model_patcher.set_model_options_patch_replace({**options}, patch, kind, "input", 2)
    return options


def test_a_patch_around_ours_does_not_double_the_features(full: Any, subject: Any, expected: torch.Tensor) -> None:
    """On the MODEL, and put there by a wrapper around ours."""
    on_model = full.clone()
    on_model.model_options = wrapped(on_model.model_options)
    for other in (on_model, *(new_options_from(kind, wrapped)(full) for kind in ("sampler_sample", "predict_noise"))):
        samples = run(other, subject)
        assert torch.equal(samples, expected)
        assert torch.equal(masks_of(other, samples)[subject.key], masks_of(full, expected)[subject.key])
