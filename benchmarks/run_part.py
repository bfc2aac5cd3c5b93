"""run: whole runs, the reference pass included; the first picture of a subject, and the next with another seed."""

from functools import partial
from typing import Any

import torch
from measure import CFG, seconds_of, summary
from session import Session
from workload import Scene, moma_model, prompts

CASES = ("all",)


def measure(session: Session, case: str) -> dict[str, Any]:
    """`plain_s` of a run, and the ratios of `first` and `next` to it."""
    plan = session.plan
    plain = session.workload.model
    _run(plain, session, Scene(), seed=0, steps=1)  # loads the model
    times: dict[str, list[float]] = {"plain": [], "first": [], "next": []}
    for number in range(plan.run_rounds):
        scene = Scene(seed=number)  # a subject that no earlier round has seen
        patched = moma_model(session.workload, scene)
        for name, model, seed in (("plain", plain, 1), ("first", patched, 1), ("next", patched, 2)):
            times[name].append(seconds_of(partial(_run, model, session, scene, seed, plan.run_steps)))
    return {**summary(times, "plain"), "latent": list(plan.run_size), "steps": plan.run_steps}


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part's place in the results."""
    return measured["all"]


def _run(model: Any, session: Session, scene: Scene, seed: int, steps: int) -> torch.Tensor:
    """What the KSampler node does."""
    import comfy.sample

    positive, negative = prompts(session.workload, scene)
    latent = torch.zeros(1, 4, *session.plan.run_size)
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, CFG, "euler", "normal", positive, negative, latent, seed=seed, disable_pbar=True
        )
