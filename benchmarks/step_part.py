"""step: one evaluation with guidance (positive and negative prompt in one batch) in the middle of a run."""

from functools import partial
from typing import Any

import torch
from measure import Opener, sampling_run, summary, timed_rounds, with_steps
from memory import memory_of_steps
from released_moma import released_steps
from session import Session
from workload import Scene, moma_model, prompts

from workbench.scene import masks_of

CASES = ("all",)


def measure(session: Session, case: str) -> dict[str, Any]:
    """`plain_s`, and for every other way its ratio to that; below `memory` the same for the memory that a step needs.

    `subject_share` is the part of the new picture that the measured step takes for the subject.
    """
    from image_attention import image_adapter_model

    plan, workload, scene = session.plan, session.workload, Scene()
    positive, negative = prompts(workload, scene)
    models = {
        "plain": workload.model,
        "apply": moma_model(workload, scene, with_shortcut=False),
        "shortcut": moma_model(workload, scene, apply=False),
        "both": moma_model(workload, scene),
        "ipadapter": image_adapter_model(
            workload.model, workload.adapter.sizes.layers, workload.context_size, session.dtype
        ),
    }
    samples: dict[str, torch.Tensor] = {}
    openers: dict[str, Opener] = {
        name: sampling_run(model, positive, negative, plan.step_size, ended=partial(samples.__setitem__, name))
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}

    def rounds(steps: dict[str, Any]) -> None:
        if session.moma_repo is not None:
            steps = {**steps, **released_steps(session.moma_repo, workload, scene, plan.step_size)}
        timed_rounds(steps, plan.warm_up)
        times.update(timed_rounds(steps, plan.step_rounds))
        memory.update(memory_of_steps(steps))

    with torch.inference_mode():
        with_steps(openers, rounds)
    (mask,) = masks_of(models["both"], samples["both"]).values()
    return {
        **summary(times, "plain"),
        "memory": memory,
        "latent": list(plan.step_size),
        "mask": scene.mask,
        "subject_share": float((mask > 0).float().mean()),
    }


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part's place in the results."""
    return measured["all"]
