"""leak: many runs on one model, which is patched, cloned and patched again for each; memory must stay flat."""

import gc
from statistics import linear_regression
from typing import Any

import torch
from memory import MemoryMeter
from plan import TINY
from session import Session
from workload import Scene, Workload, load_workload, moma_model, prompts

CASES = ("plain", "moma")
SIZE = (8, 8)
STEPS = 2


def measure(session: Session, case: str) -> dict[str, Any]:
    """Memory growth in KiB per run, and what there was to count after the first and after the last run."""
    from workbench.scene import sample

    workload, scene = load_workload(TINY.tiny, session.dtype), Scene()
    positive, negative = prompts(workload, scene)
    meter = MemoryMeter()
    memory: list[float] = []
    counts: list[dict[str, int]] = []
    gc.collect()
    gc.freeze()  # what is there before the first run is neither collected nor counted
    for number in range(session.plan.leak_runs):
        model = _patched_again(workload, scene) if case == "moma" else workload.model.clone()
        sample(model, positive, negative, size=SIZE, steps=STEPS, seed=number)
        if number in (0, session.plan.leak_runs - 1):
            counts.append(_counts(model))
        del model
        gc.collect()
        memory.append(1024 * meter.now_mb())
    gc.unfreeze()
    settled = memory[len(memory) // 2 :]  # allocators fill up first
    return {
        "runs": len(memory),
        "kb_per_run": linear_regression(range(len(settled)), settled).slope,
        "counts": {name: [count[name] for count in counts] for name in counts[0]},
    }


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part's place in the results: growth per run of both, counts with MoMA."""
    growth = {f"{case}_kb_per_run": found["kb_per_run"] for case, found in measured.items()}
    return {"runs": measured["moma"]["runs"], **growth, "counts": measured["moma"]["counts"]}


def _patched_again(workload: Workload, scene: Scene) -> Any:
    from comfyui_moma.moma_modules.sampling.patching import settings_of

    from workbench.scene import moma

    model = moma_model(workload, scene).clone()
    for entry in settings_of(model).subjects:
        model = moma(model, entry.adapter, entry.subject, shortcut=entry.shortcut)
    return model


def _counts(model: Any) -> dict[str, int]:
    import comfy.model_management

    gc.collect()
    replaced = model.model_options["transformer_options"].get("patches_replace", {})
    return {
        "wrappers": sum(len(entries) for kinds in model.wrappers.values() for entries in kinds.values()),
        "patches": sum(len(slots) for slots in replaced.values()),
        "callbacks": sum(len(entries) for kinds in model.callbacks.values() for entries in kinds.values()),
        "loaded models": len(comfy.model_management.current_loaded_models),
        "run states": sum(type(item).__name__ == "RunState" for item in gc.get_objects()),
        "tensors": sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()),
    }
