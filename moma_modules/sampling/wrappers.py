"""How ComfyUI's sampling reaches a run: a wrapper for each of its steps, put on a clone of a MODEL.

`outer_sample` makes a fresh `Run` for every run and drops it at the end, also after an interrupt or an error. It
travels in the run's own copy of the transformer options; nothing is kept on the model, in a module or in a patch.
"""

from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..host.messages import only_looking
from .compilation import take_compilation
from .guard import Guard
from .other_nodes import check_other_nodes
from .patching import Wrappers, install, make_whole, settings_of
from .placing import Placing
from .run import RunState
from .settings import KEY, Settings
from .unet_calls import apply_model, watch


def patched(model: Any, settings: Settings) -> Any:
    """A clone of `model` that runs with `settings`; `model` is unchanged.

    Applying settings to a model that has some already replaces them and installs nothing twice.
    """
    clone = model.clone()
    install(clone, settings, outer_sample, WRAPPERS)
    return clone


def outer_sample(
    executor: Any,
    settings: Settings,
    noise: Any,
    latent_image: Any,
    sampler: Any,
    sigmas: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """OUTER_SAMPLE: gives the run its state, and logs the masks of a run that ended well.

    Args:
        settings: Those that were installed with the caller.
    """
    guider = executor.class_obj
    patcher, original = guider.model_patcher, guider.model_options
    if _state(original) is not None:  # it lies on the model twice
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    settings = settings_of(patcher) or settings
    check_other_nodes(patcher, settings, original["transformer_options"])
    guider.model_options = comfy.model_patcher.create_model_options_clone(original)
    options = guider.model_options["transformer_options"]
    make_whole(patcher, settings, options, WRAPPERS)
    compilation, placing = take_compilation(patcher, guider.model_options), Placing(settings, latent_image, sigmas)
    options[KEY] = state = RunState(settings, Guard(settings, WRAPPERS), compilation, placing)
    watch(guider.model_options, state.guard.calls)
    try:
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        state.guard.finish(state.seeks_subjects)
        with only_looking("keeping the masks of this run for MoMA Subject Mask"):
            state.log(samples)
        return samples
    finally:
        state.clear()
        guider.model_options = original


def sampler_sample(
    executor: Any, guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *args: Any
) -> Any:
    """SAMPLER_SAMPLE: the model is loaded and the prompts are processed; sampling is about to start."""
    state = _state(guider.model_options)
    if state is not None:
        model_options = state.guard.whole(state, extra_args["model_options"])
        extra_args = {**extra_args, "model_options": model_options}
        state.prepare(guider, model_options, noise)
    return executor(guider, sigmas, extra_args, callback, noise, *args)


def predict_noise(executor: Any, x: Any, timestep: Any, model_options: Any = None, *args: Any, **kwargs: Any) -> Any:
    """PREDICT_NOISE: one evaluation of all prompts."""
    state = _state(executor.class_obj.model_options)
    if state is None:
        return executor(x, timestep, model_options, *args, **kwargs)
    state.guard.check_prepared()
    model_options = state.guard.whole(state, model_options)
    state.begin_evaluation(model_options, x.device)
    out = executor(x, timestep, model_options, *args, **kwargs)
    state.end_evaluation()
    return out


def calc_cond_batch(executor: Any, model: Any, conds: Any, x_in: Any, timestep: Any, model_options: Any) -> Any:
    """CALC_COND_BATCH: the evaluation itself, or an extra call by a guidance node within it."""
    state = _state(model_options)
    if state is None:
        return executor(model, conds, x_in, timestep, model_options)
    state.begin_call(model_options)
    try:
        return executor(model, conds, x_in, timestep, model_options)
    finally:
        state.end_call()


def _state(model_options: dict[str, Any] | None) -> RunState | None:
    return (model_options or {}).get("transformer_options", {}).get(KEY)


WRAPPERS: Wrappers = {
    WrappersMP.SAMPLER_SAMPLE: sampler_sample,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}
"""What reaches a run after its start."""
