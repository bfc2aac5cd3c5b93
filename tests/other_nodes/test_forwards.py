"""Only complete forwards over the run's own rows get the features and feed the masks; those of others do neither."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding
from comfy.patcher_extension import WrappersMP
from comfyui_moma.moma_modules.sampling.unet import BLOCKS
from compat_rows import message

from workbench.scene import close, masks_of, moma, run
from workbench.tiny_models import seeded

Change = Callable[[torch.Tensor], torch.Tensor]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def noise_like(x: torch.Tensor, seed: int = 91) -> torch.Tensor:
    return seeded(seed, "other", tuple(x.shape))


def in_wrapper(kind: str, inputs: Callable[[torch.Tensor], list[torch.Tensor]], kept: int, first: bool = False) -> Any:
    """A node whose wrapper runs what is below it on `inputs(x)`, and hands on the output number `kept`."""

    def wrapper(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = []
        for other in inputs(x):
            # As many of everything as there are rows.
            rows = len(other)
            cut = [part[:rows] if isinstance(part, torch.Tensor) and len(part) == len(x) else part for part in args]
            some = {
                key: part[:rows] if isinstance(part, torch.Tensor) and len(part) == len(x) else part
                for key, part in kwargs.items()
            }
            outputs.append(executor(other, *cut, **some))
        return outputs[kept]

    def add(model: Any) -> Any:
        clone = model.clone()
        before = clone.wrappers.get(kind, {})
        clone.wrappers[kind] = {"other": [wrapper], **before} if first else {**before, "other": [wrapper]}
        return clone

    return add


def in_function(inputs: Callable[[torch.Tensor], list[torch.Tensor]], kept: int) -> Any:
    """The same through `model_function_wrapper`."""

    def wrapper(model: Any, args: dict[str, Any]) -> Any:
        return [model(other, args["timestep"], **args["c"]) for other in inputs(args["input"])][kept]

    def add(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    return add


PLACES: dict[str, Callable[..., Any]] = {
    "DIFFUSION_MODEL": lambda inputs, kept: in_wrapper(WrappersMP.DIFFUSION_MODEL, inputs, kept),
    "APPLY_MODEL below ours": lambda inputs, kept: in_wrapper(WrappersMP.APPLY_MODEL, inputs, kept),
    "APPLY_MODEL around ours": lambda inputs, kept: in_wrapper(WrappersMP.APPLY_MODEL, inputs, kept, first=True),
    "model_function_wrapper": in_function,
}

EXTRA: dict[str, tuple[Callable[[torch.Tensor], list[torch.Tensor]], int]] = {
    "before, another latent": (lambda x: [noise_like(x), x], 1),
    "after, another latent": (lambda x: [x, noise_like(x)], 0),
    "two others, one on each side": (lambda x: [noise_like(x), x, noise_like(x, 92)], 1),
    "before, the same latent": (lambda x: [x, x], 1),
    "before, a copy of the latent": (lambda x: [noise_like(x), x.clone()], 1),
    "before, another size": (lambda x: [noise_like(x)[..., :4], x], 1),
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("place", PLACES)
def test_an_extra_forward_changes_nothing(
    full: Any, subject: Any, expected: torch.Tensor, place: str, extra: str
) -> None:
    """The picture and the mask are those without it, to the bit."""
    patched = PLACES[place](*EXTRA[extra])(full)
    samples = run(patched, subject)
    assert difference(samples, expected) == 0
    assert torch.equal(masks_of(patched, samples)[subject.key], masks_of(full, expected)[subject.key])


@pytest.mark.parametrize("place", PLACES)
def test_an_extra_forward_does_not_get_the_features(model: Any, full: Any, subject: Any, place: str) -> None:
    """What it gives is what the UNet gives there without MoMA."""
    outputs: dict[str, torch.Tensor] = {}

    def probed(name: str, candidate: Any) -> None:
        def probe(_: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            calls.append(output)

        calls: list[torch.Tensor] = []
        unet = candidate.model.diffusion_model
        other = PLACES[place](lambda x: [torch.zeros_like(x), x], 1)(candidate)
        # `forward` is called once for all that wrappers do at DIFFUSION_MODEL; its last layer once for every pass.
        handle = unet.out.register_forward_hook(probe)
        try:
            run(other, subject, steps=1)
        finally:
            handle.remove()
        outputs[name] = calls[-2]

    probed("plain", model)
    probed("MoMA", full)
    assert difference(outputs["plain"], outputs["MoMA"]) == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_latent_that_is_changed_on_its_way_is_still_the_runs_own(
    model: Any, full: Any, subject: Any, expected: torch.Tensor, place: str
) -> None:
    """Nodes that add noise to the UNet's input: MoMA acts, and the mask forms."""

    def noisy(x: torch.Tensor) -> list[torch.Tensor]:
        return [x + 0.05 * noise_like(x)]

    patched = PLACES[place](noisy, 0)(full)
    samples = run(patched, subject)
    assert not close(samples, expected, 1e-3), "the noise acts"
    assert not close(samples, run(PLACES[place](noisy, 0)(model), subject), 1e-2), "and so does MoMA"
    assert float(masks_of(patched, samples)[subject.key].std()) > 0.05
    same = [PLACES[other](noisy, 0)(full) for other in PLACES if other != "DIFFUSION_MODEL"]
    if place != "DIFFUSION_MODEL":
        assert all(torch.equal(run(other, subject), samples) for other in same)


def test_a_batch_in_parts_is_still_the_runs_own(full: Any, subject: Any) -> None:
    """Nodes that save memory: the rows one by one, with all that belongs to them."""

    def one_by_one(model: Any, args: dict[str, Any]) -> torch.Tensor:
        x = args["input"]
        outputs = []
        for i in range(len(x)):
            c = {
                key: value[i : i + 1] if isinstance(value, torch.Tensor) and len(value) == len(x) else value
                for key, value in args["c"].items()
            }
            outputs.append(model(x[i : i + 1], args["timestep"][i : i + 1], **c))
        return torch.cat(outputs)

    patched = full.clone()
    patched.set_model_unet_function_wrapper(one_by_one)
    samples, expected = run(patched, subject, batch=2), run(full, subject, batch=2)
    assert close(samples, expected, 1e-5)
    assert close(masks_of(patched, samples)[subject.key], masks_of(full, expected)[subject.key], 1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_where_it_cannot_be_told_which_forward_is_the_runs_own(full: Any, subject: Any, place: str) -> None:
    other = PLACES[place](lambda x: [x + 1, x + 2], 1)(full)
    with pytest.raises(ValueError, match=r"^MoMA: another node changes the latent .*Others on this model: \w"):
        run(other, subject)


@pytest.mark.parametrize("second", ["another size", "no forward"])
def test_a_latent_that_is_changed_once_only_is_refused(full: Any, subject: Any, second: str) -> None:
    """Asked again for the same evaluation, the node does something else: no forward is the run's own."""
    calls: list[int] = []

    def wrapper(model: Any, args: dict[str, Any]) -> Any:
        calls.append(1)
        x, rest = args["input"], (args["timestep"],)
        if len(calls) == 1:
            return model(x + 1, *rest, **args["c"])
        return x if second == "no forward" else model(x[..., :4], *rest, **args["c"]).repeat(1, 1, 1, 2)

    patched = full.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match="^MoMA: another node gives the UNet another latent than the sampler's"):
        run(patched, subject)
    assert len(calls) == 2


class FirstBlockCache:
    """As WaveSpeed's: the first block with attention runs always, the rest in the first evaluation only."""

    def __init__(self, whole: int) -> None:
        self.whole = whole
        self.calls = 0
        self.output: Any = None

    def __call__(self, executor: Any, x: Any, timesteps: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.whole:
            self.output = executor(x, timesteps, context, *args, **kwargs)
            return self.output
        unet, options = executor.class_obj, args[2]
        embedding = unet.time_embed(timestep_embedding(timesteps, unet.model_channels).to(x.dtype))
        h = x
        for number in (0, 1):
            options["block"] = ("input", number)
            h = forward_timestep_embed(unet.input_blocks[number], h, embedding, context, options)
        return self.output


def cached(model: Any, whole: int) -> Any:
    clone = model.clone()
    cache = FirstBlockCache(whole)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cache)
    return clone


def test_a_cache_of_the_first_block_leaves_the_last_mask(full: Any, subject: Any) -> None:
    """After one whole evaluation the cache answers: the mask is the one that evaluation made, to the bit."""
    patched = cached(full, whole=1)
    samples = run(patched, subject)
    one = run(full, subject, last_step=1)
    assert torch.equal(masks_of(patched, samples)[subject.key], masks_of(full, one)[subject.key])


def replaced_forward(model: Any, change: Callable[..., Any]) -> Any:
    """The UNet's own `_forward` replaced, as packs do that know no wrappers; `change(original, x, ...)`."""
    clone = model.clone()
    original = model.model.diffusion_model._forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    clone.add_object_patch("diffusion_model._forward", forward)
    return clone


def test_a_unet_that_runs_twice_unseen_is_refused(full: Any, subject: Any, expected: torch.Tensor) -> None:
    def twice(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        original(noise_like(x), *args, **kwargs)
        return original(x, *args, **kwargs)

    with pytest.raises(ValueError, match="^MoMA: another node runs the UNet more than once for one evaluation"):
        run(replaced_forward(full, twice), subject)
    assert torch.equal(run(full, subject), expected)


def test_a_unet_without_attention_is_refused(full: Any, subject: Any, expected: torch.Tensor) -> None:
    """As engines do that run a compiled UNet in the place of ComfyUI's."""
    with pytest.raises(ValueError, match="^MoMA: another node runs this model without its attention layers"):
        run(replaced_forward(full, lambda _, x, *__, **___: torch.zeros_like(x)), subject)
    assert torch.equal(run(full, subject), expected)


def test_layers_that_are_left_out_for_good_are_said(full: Any, subject: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No forward is complete: there is no mask, and the log says why."""

    def without_the_middle(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        unet = original.__self__
        middle, unet.middle_block = unet.middle_block, None
        try:
            return original(x, *args, **kwargs)
        finally:
            unet.middle_block = middle

    with caplog.at_level("WARNING"):
        patched = replaced_forward(full, without_the_middle)
        samples = run(patched, subject)
    assert "no forward of this run came to all attention layers once and in order" in caplog.text
    assert bool((masks_of(patched, samples)[subject.key] == 1).all())


def test_a_node_that_runs_layers_by_itself_gets_no_features(full: Any, subject: Any) -> None:
    """With the UNet's options, but not through the UNet: in no forward of the run is there anything of MoMA."""
    patched = cached(full, whole=0)
    patched.wrappers[WrappersMP.DIFFUSION_MODEL]["cache"][0].output = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="^MoMA: another node runs this model without its attention layers"):
        run(patched, subject)


class Parts:
    """Self-attention of the negative rows once more by itself, as Advanced-ControlNet's style fidelity does it."""

    def __init__(self, slot: Any, whole: bool) -> None:
        self.slot, self.whole = slot, whole

    def __call__(self, q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
        half = len(q) // 2
        parts = [self.slot(*(x[rows] for x in (q, k, v)), extra_options) for rows in (slice(half), slice(half, None))]
        return self.slot(q, k, v, extra_options) if self.whole else torch.cat(parts)


def in_parts(model: Any, whole: bool) -> Any:
    """Around our slots, put there when sampling has begun."""
    clone = model.clone()

    def wrapper(
        executor: Any, x: Any, timesteps: Any, context: Any, y: Any, control: Any, options: Any, **kw: Any
    ) -> Any:
        slots = options["patches_replace"]
        around = {place: Parts(slots["attn1"][place], whole) for place in BLOCKS}
        options["patches_replace"] = {**slots, "attn1": around}
        return executor(x, timesteps, context, y, control, options, **kw)

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "parts", wrapper)
    return clone


def test_some_rows_once_more_change_nothing(full: Any, subject: Any, expected: torch.Tensor) -> None:
    assert difference(run(in_parts(full, whole=True), subject), expected) == 0


def test_rows_in_parts_only_are_refused(full: Any, subject: Any, expected: torch.Tensor) -> None:
    words = "^MoMA: another node computes the self-attention of input block 1 for some rows of a batch at a time"
    with pytest.raises(ValueError, match=words):
        run(in_parts(full, whole=False), subject)
    assert torch.equal(run(full, subject), expected)


class Unit(torch.nn.Module):
    """In the place of an attention layer, as LayerDiffuse's units: without to_q, to_k, to_v and to_out."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


PATHS = {
    "attn2": "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2",
    "attn1": "diffusion_model.middle_block.1.transformer_blocks.0.attn1",
    "the block of both": "diffusion_model.output_blocks.3.1.transformer_blocks.0",
}


@pytest.mark.parametrize("layer", PATHS)
@pytest.mark.parametrize("first", [True, False])
def test_replaced_attention_layers_are_refused_before_sampling(
    model: Any, adapter: Any, subject: Any, layer: str, first: bool
) -> None:
    """As an object patch, before or after our nodes, with the model good afterwards."""

    def replaced(candidate: Any) -> Any:
        clone = candidate.clone()
        clone.add_object_patch(PATHS[layer], Unit())
        return clone

    patched = moma(replaced(model), adapter, subject) if first else replaced(moma(model, adapter, subject))
    started: list[int] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: started.append(1))
    try:
        with pytest.raises(ValueError, match=r"^MoMA: another node replaced the UNet's attention layer attn") as raised:
            run(patched, subject)
    finally:
        handle.remove()
    assert message("LayerDiffuse (SD1.5)") in str(raised.value) and not started
    assert torch.equal(run(moma(model, adapter, subject), subject), run(moma(model, adapter, subject), subject))


def test_text_that_was_not_marked_is_not_looked_at(full: Any, subject: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As ELLA's older node does it: other text, with tokens of its own before CLIP's. The marks do not fit it."""

    def other_text(model: Any, args: dict[str, Any]) -> Any:
        text = args["c"]["c_crossattn"]
        before = noise_like(text[:, :64])
        return model(args["input"], args["timestep"], **{**args["c"], "c_crossattn": torch.cat([before, text], dim=1)})

    patched = full.clone()
    patched.set_model_unet_function_wrapper(other_text)
    with caplog.at_level("WARNING"):
        samples = run(patched, subject)
    assert bool((masks_of(patched, samples)[subject.key] == 1).all())
    assert caplog.text.count(message("Nodes that replace the text during the run")) == 1
