"""The widgets of ComfyUI's KSampler, for nodes that expand into one."""

import comfy.samplers
from comfy_api.latest import io


def sampling_inputs() -> list[io.Input]:
    """seed, steps, cfg, sampler_name, scheduler and denoise, with MoMA's defaults."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Seed of the noise, the same for all pictures.",
        ),
        io.Int.Input("steps", default=30, min=1, max=10000, tooltip="Steps of each sampler."),
        io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale."),
        io.Combo.Input(
            "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="ddim", tooltip="As in KSampler."
        ),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform", tooltip="As in KSampler."
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Below 1 the given latent is changed only that far, as in KSampler.",
            advanced=True,
        ),
    ]
