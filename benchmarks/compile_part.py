"""compile: a step of the UNet as TorchCompileModel compiles it, without and with both parts of MoMA."""

from typing import Any

import torch
from measure import sampling_run, summary, timed_rounds, with_steps
from session import Session
from workload import Scene, moma_model, prompts

from workbench.scene import compiled

CASES = ("all",)


def measure(session: Session, case: str) -> dict[str, Any]:
    """`plain_compiled_s`, and for every other way its ratio to that.

    `graphs` is how many graphs torch compiled for the first steps, and for all later ones.
    """
    plan, scene = session.plan, Scene()
    models = {"plain": session.workload.model, "both": moma_model(session.workload, scene)}
    models |= {f"{name}_compiled": compiled(model, plan.compile_backend) for name, model in models.items()}
    conditionings = prompts(session.workload, scene)
    openers = {name: sampling_run(model, *conditionings, plan.compile_size) for name, model in models.items()}
    before, found = _graphs(), {}

    def rounds(steps: dict[str, Any]) -> None:
        timed_rounds(steps, plan.warm_up)
        first = _graphs()
        found.update(summary(timed_rounds(steps, plan.compile_rounds), "plain_compiled"))
        found["graphs"] = {"first": first - before, "later": _graphs() - first}

    with torch.inference_mode():
        with_steps(openers, rounds)
    return {**found, "latent": list(plan.compile_size)}


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part's place in the results."""
    return measured["all"]


def _graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
