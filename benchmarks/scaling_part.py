"""scaling: time and memory of a step with both parts of MoMA, over picture size, batch, mask, references, subjects."""

from typing import Any

import torch
from measure import Opener, Step, sampling_run, summary, timed_rounds, with_steps
from memory import memory_of_steps
from plan import Size
from session import Session
from workload import Scene, moma_model, prompts

CASES = ("all",)
MANY_PIXELS = 64 * 96
"""Latent pixels above which a step is timed once."""


def measure(session: Session, case: str) -> dict[str, Any]:
    """Per group of runs `plain_s` and ratios; below `memory` the same for the memory that a step needs."""
    plan = session.plan
    groups = {_size_name(size): _group(session, size, 1, {"both": Scene()}) for size in plan.scaling_sizes}
    for batch in plan.scaling_batches:
        name = f"{_size_name(plan.scaling_batch)}, batch {batch}"
        groups[name] = _group(session, plan.scaling_batch, batch, {"both": Scene()})
    scenes = {
        "both": Scene(),
        **{f"mask {round(100 * mask)} %": Scene(mask=mask) for mask in plan.scaling_masks},
        **{f"{count} references": Scene(references=count) for count in plan.scaling_references},
        **{f"{count} subjects": Scene(subjects=count) for count in plan.scaling_subjects},
    }
    groups[f"{_size_name(plan.scaling_scene)}, scenes"] = _group(session, plan.scaling_scene, 1, scenes)
    return groups


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part's place in the results."""
    return measured["all"]


def _size_name(size: Size) -> str:
    """Pixels, width first."""
    return f"{8 * size[1]}x{8 * size[0]}"


def _group(session: Session, size: Size, batch: int, scenes: dict[str, Scene]) -> dict[str, Any]:
    plain = sampling_run(session.workload.model, *prompts(session.workload, Scene()), size, batch)
    openers: dict[str, Opener] = {"plain": plain}
    for name, scene in scenes.items():
        model = moma_model(session.workload, scene)
        openers[name] = sampling_run(model, *prompts(session.workload, scene), size, batch)
    found: dict[str, Any] = {}
    count = session.plan.scaling_rounds if size[0] * size[1] * batch <= MANY_PIXELS else 1

    def rounds(steps: dict[str, Step]) -> None:
        timed_rounds(steps, session.plan.warm_up)
        found.update(summary(timed_rounds(steps, count), "plain"))
        found["memory"] = memory_of_steps(steps)

    with torch.inference_mode():
        with_steps(openers, rounds)
    return found
