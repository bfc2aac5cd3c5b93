"""share: a step by how much of the new picture is the subject's, over batch and size.

With random weights the found mask is nearly all of the picture; a region mask keeps the subject to a part of it, as
large as the mask of a subject is with trained weights. What Self-Attn Shortcut computes on a CPU follows that part.
"""

from typing import Any

import torch
from measure import Opener, Step, sampling_run, summary, timed_rounds, with_steps
from plan import Size
from scaling_part import MANY_PIXELS
from session import Session
from workload import Scene, moma_model, prompts

CASES = ("all",)


def measure(session: Session, case: str) -> dict[str, Any]:
    """Per picture size and batch `plain_s` and ratios: of both parts at each share, of each part at the first."""
    first, *others = session.plan.shares
    alone = {
        "apply": moma_model(session.workload, Scene(), with_shortcut=False),
        f"shortcut, {first:.0%}": moma_model(session.workload, Scene(share=first), apply=False),
    }
    found = {}
    for size, batch in session.plan.share_runs:
        shares = [first, *others] if batch == 1 else [first]
        both = {f"both, {share:.0%}": moma_model(session.workload, Scene(share=share)) for share in shares}
        found[f"{8 * size[1]}x{8 * size[0]}, batch {batch}"] = _group(session, size, batch, alone | both)
    return found


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part's place in the results."""
    return measured["all"]


def _group(session: Session, size: Size, batch: int, models: dict[str, Any]) -> dict[str, Any]:
    asked = prompts(session.workload, Scene())
    openers: dict[str, Opener] = {
        name: sampling_run(model, *asked, size, batch)
        for name, model in {"plain": session.workload.model, **models}.items()
    }
    found: dict[str, Any] = {}
    count = session.plan.share_rounds if size[0] * size[1] * batch <= MANY_PIXELS else 1

    def rounds(steps: dict[str, Step]) -> None:
        timed_rounds(steps, session.plan.warm_up)
        found.update(summary(timed_rounds(steps, count), "plain"))

    with torch.inference_mode():
        with_steps(openers, rounds)
    return found
