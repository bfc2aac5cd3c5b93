"""Timing things against each other: every round times each of them once, so that a slow moment hits all alike."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Step = Callable[[], object]
"""One evaluation, to be timed."""

Opener = Callable[[Callable[[Step], None]], None]
"""Starts a run, gives one of its steps to a function, and ends the run once that returns."""

CFG = 7.5
SCHEDULE = 20
"""Steps of the schedule that the timed step is the middle one of."""


def sampling_run(
    model: Any,
    positive: list,
    negative: list,
    size: tuple[int, int],
    batch: int = 1,
    ended: Callable[[torch.Tensor], object] = lambda samples: None,
) -> Opener:
    """A run of ComfyUI's sampling that stops at the middle of its schedule, where the subject mask is known.

    Args:
        size: Height and width of the latent.
        ended: Gets the samples that the run returns.
    """
    import comfy.sample
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", SCHEDULE)

    def open_run(body: Callable[[Step], None]) -> None:
        def sampler(denoise: Any, noise: torch.Tensor, sigmas: Any, extra_args: Any, **_: Any) -> torch.Tensor:
            ones = noise.new_ones(noise.shape[0])
            denoise(noise, sigmas[0] * ones, **extra_args)  # finds the mask, and warms up
            middle = sigmas[SCHEDULE // 2]
            x = noise / sigmas[0] * middle
            body(lambda: denoise(x, middle * ones, **extra_args))
            return noise

        noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            samples = comfy.sample.sample_custom(
                model,
                noise,
                CFG,
                comfy.samplers.KSAMPLER(sampler),
                sigmas,
                positive,
                negative,
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=1,
            )
        ended(samples)

    return open_run


def with_steps(openers: dict[str, Opener], body: Callable[[dict[str, Step]], None]) -> None:
    """Open all runs, one within the other, and give their steps to `body`."""
    if not openers:
        body({})
        return
    (name, opener), *others = openers.items()
    opener(lambda step: with_steps(dict(others), lambda steps: body({name: step, **steps})))


def seconds_of(step: Step) -> float:
    """Wall time of one evaluation, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed_rounds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round. Each round starts with another step."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds_of(steps[name]))
    return times


def ratios(times: dict[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """Per round, how many times the baseline of the same round each one took; the baseline is left out."""
    return {
        name: [value / base for value, base in zip(values, times[baseline], strict=True)]
        for name, values in times.items()
        if name != baseline
    }


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    """`{baseline}_s`: median seconds; each other name: median ratio; `spread`: lowest and highest of each."""
    found = ratios(times, baseline)
    base = times[baseline]
    return {
        f"{baseline}_s": median(base),
        **{name: median(values) for name, values in found.items()},
        "spread": {
            f"{baseline}_s": [min(base), max(base)],
            **{name: [min(values), max(values)] for name, values in found.items()},
        },
        "rounds": len(base),
    }
