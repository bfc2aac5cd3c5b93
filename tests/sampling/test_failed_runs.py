"""Runs that are cancelled, fail or run out of memory leave nothing behind, and many runs leave no more than one."""

import gc
import hashlib
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import numpy as np
import psutil
import pytest
import torch
from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.moma_modules.sampling.caches import caches_of
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.subject.run_log import MOST_RUNS, FinishedRun
from torch.nn.modules.module import register_module_forward_hook

from workbench import ROOT
from workbench.scene import masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut, tiny_subject
from workbench.tiny_models import tiny_model

STEPS = 3
FAILURES: dict[str, Callable[[], BaseException]] = {
    "interrupt": comfy.model_management.InterruptProcessingException,
    "error": lambda: RuntimeError("a node in the way failed"),
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "ComfyUI's out of memory": lambda: comfy.model_management.OOM_EXCEPTION("Allocation on device"),
}
FORWARDS = {"reference pass": 0, "first step": 1, "last step": STEPS}


def full(model: Any, adapter: Any) -> tuple[Any, Any]:
    subject = tiny_subject(adapter)
    return moma(model, adapter, subject, shortcut=tiny_shortcut(start=0.0)), subject


def run(patched: Any, subject: Any, **changes: Any) -> torch.Tensor:
    return sample(patched, positive(subject), negative(), **{"steps": STEPS, **changes})


def fresh() -> torch.Tensor:
    """The run on models that nothing has ever happened to."""
    return run(*full(tiny_model(), tiny_adapter()))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return fresh()


@contextmanager
def failing(model: Any, forward: int, failure: Callable[[], BaseException]) -> Iterator[None]:
    """The given forward raises in the middle of the UNet."""
    count = iter(range(1000))
    transformer = model.model.diffusion_model.middle_block[1]

    def fail(*_: Any) -> None:
        if next(count) == forward:
            raise failure()

    handle = transformer.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def belongings(patcher: Any) -> dict[str, Any]:
    """Everything that a run or a node could have left on a MODEL and the modules below it, counted or by identity."""
    modules = list(patcher.model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    options = patcher.model_options["transformer_options"]
    return {
        "wrappers": {k: {key: list(map(id, w)) for key, w in v.items()} for k, v in patcher.wrappers.items()},
        "callbacks": {k: {key: list(map(id, c)) for key, c in v.items()} for k, v in patcher.callbacks.items()},
        "attachments": {key: id(value) for key, value in patcher.attachments.items()},
        "additional models": {key: list(map(id, value)) for key, value in patcher.additional_models.items()},
        "patches": (len(patcher.patches), len(patcher.hook_patches), len(patcher.object_patches)),
        "model options": sorted(patcher.model_options),
        "transformer options": {key: id(value) for key, value in options.items()},
        "attention patches": {
            slot: {place: id(patch) for place, patch in patches.items()}
            for slot, patches in options.get("patches_replace", {}).items()
        },
        "module hooks": sum(len(getattr(module, kind)) for module in modules for kind in hooks),
        "module attributes": sum(len(vars(module)) for module in modules),
        "loaded models": len(comfy.model_management.current_loaded_models),
    }


@pytest.mark.parametrize("place", FORWARDS)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_leaves_nothing(model: Any, expected: torch.Tensor, place: str, failure: str) -> None:
    patched, subject = full(model, tiny_adapter())
    run(patched, subject, steps=1, seed=99)
    caches_of(settings_of(patched).subjects[0].adapter).references.clear()
    before = belongings(patched)
    raised = type(FAILURES[failure]())
    with failing(model, FORWARDS[place], FAILURES[failure]):
        with pytest.raises(raised):
            run(patched, subject, batch=2, size=(8, 16), cfg=3.0)
        assert belongings(patched)["transformer options"] == before["transformer options"]
    assert belongings(patched) == before
    assert torch.equal(run(patched, subject), expected)
    other, subject = full(tiny_model(), settings_of(patched).subjects[0].adapter)
    assert torch.equal(run(other, subject), expected)


def test_a_failure_inside_attention_leaves_nothing(model: Any, expected: torch.Tensor) -> None:
    """As a real card fails: in an attention call of ours, with an attention function that another node chose."""
    patched, subject = full(model, tiny_adapter())
    calls: list[int] = []

    def override(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **kwargs)

    clone = patched.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    with pytest.raises(torch.OutOfMemoryError):
        run(clone, subject)
    assert len(calls) == 150
    assert torch.equal(run(clone, subject), expected) and torch.equal(run(patched, subject), expected)


@pytest.mark.parametrize("failure", [None, *FAILURES])
def test_the_guider_gets_its_options_back(model: Any, failure: str | None) -> None:
    patched, subject = full(model, tiny_adapter())
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive(subject), negative())
    guider.set_cfg(7.5)
    options, keys = guider.model_options, sorted(guider.model_options["transformer_options"])
    sampler, noise = comfy.samplers.sampler_object("euler"), torch.ones(1, 4, 8, 8)
    sigmas = torch.tensor([10.0, 1.0, 0.0])

    def attempt() -> None:
        with torch.inference_mode():
            guider.sample(noise, torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True)

    if failure is None:
        attempt()
    else:
        with failing(model, 1, FAILURES[failure]), pytest.raises(type(FAILURES[failure]())):
            attempt()
    assert guider.model_options is options
    assert sorted(options["transformer_options"]) == keys


FRESH_PROCESS = """
from workbench.bootstrap import bootstrap
bootstrap()
from test_failed_runs import digest, fresh
print(digest(fresh()))
"""


def digest(samples: torch.Tensor) -> str:
    return hashlib.sha256(samples.numpy().tobytes()).hexdigest()


def test_after_a_failure_the_next_run_is_that_of_a_fresh_process(model: Any) -> None:
    patched, subject = full(model, tiny_adapter())
    with failing(model, 2, FAILURES["out of memory"]), pytest.raises(torch.OutOfMemoryError):
        run(patched, subject)
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", FRESH_PROCESS]
    other = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", check=True)
    assert other.stdout.split()[-1] == digest(run(patched, subject))


def extracted(mllm: Any) -> torch.Tensor:
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    with torch.inference_mode():
        return subject_hidden_state(mllm, image, np.ones((512, 512), bool), "car", "A car in the rain.")


def layers_of(kind: str) -> list[torch.nn.Module]:
    return [item for item in gc.get_objects() if type(item).__name__ == kind]


@pytest.mark.parametrize("kind", ["CLIPEncoderLayer", "LlamaDecoderLayer"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_extraction_that_fails_leaves_nothing(kind: str, failure: str, precision: str) -> None:
    folder = ROOT / "tests" / "data" / "mllm" / "tiny56" / "checkpoint"
    expected = extracted(load_mllm(folder, precision, vision_heads=4))
    gc.collect()  # or the next would share those weights, with what is kept of the picture
    mllm = load_mllm(folder, precision, vision_heads=4)

    def fail(module: torch.nn.Module, *_: Any) -> None:
        if type(module).__name__ == kind:
            raise FAILURES[failure]()

    handle = register_module_forward_hook(fail)
    try:
        with pytest.raises(type(FAILURES[failure]())):
            extracted(mllm)
    finally:
        handle.remove()
    assert layers_of(kind) and not any(layer._forward_hooks for layer in layers_of(kind))
    assert torch.equal(extracted(mllm), expected)


def census() -> Counter:
    gc.collect()
    return Counter(type(item).__name__ for item in gc.get_objects())


def grown(before: Counter, after: Counter, least: int) -> dict[str, int]:
    """Kinds of objects of which there are at least so many more."""
    return {kind: count - before[kind] for kind, count in after.items() if count - before[kind] >= least}


def growth(patched: Any, subject: Any, runs: int) -> dict[str, int]:
    """Kinds of objects of which every second run, or more, leaves one."""
    before = census()
    for seed in range(runs):
        run(patched, subject, steps=1, seed=seed)
    return grown(before, census(), least=runs // 2)


def test_200_runs_leave_no_more_than_20(model: Any) -> None:
    patched, subject = full(model, tiny_adapter())
    first = run(patched, subject, steps=1)
    for seed in range(MOST_RUNS):  # until the log of masks is full
        finished = FinishedRun.of((subject.key,), torch.zeros(1, 1, 8, 8), 1, [])
        subject.runs.record(torch.full((1, 4, 8, 8), float(seed)), finished)
    for seed in range(20):
        run(patched, subject, steps=1, seed=seed)
    # Every load of a cloned MODEL leaves a finalizer of ComfyUI's behind, MoMA or not.
    comfyui = growth(model.clone(), subject, runs=20)
    things, memory = belongings(patched), psutil.Process().memory_info().rss
    assert set(growth(patched, subject, runs=180)) <= set(comfyui) | {"method"}
    assert psutil.Process().memory_info().rss - memory < 16 * 2**20
    assert belongings(patched) == things
    assert torch.equal(run(patched, subject, steps=1), first)


def test_200_applications_leave_no_more_than_one(model: Any) -> None:
    adapter = tiny_adapter()
    patched, subject = full(model, adapter)
    first = run(patched, subject)
    before, memory = census(), psutil.Process().memory_info().rss
    for _ in range(200):
        full(model, adapter)
    assert grown(before, census(), least=30) == {}
    assert psutil.Process().memory_info().rss - memory < 16 * 2**20
    again = patched
    for _ in range(200):  # a chain: each application on the result of the last
        again = moma(again, adapter, subject, shortcut=tiny_shortcut(start=0.0))
    counts = {kind: {key: len(w) for key, w in by_key.items()} for kind, by_key in again.wrappers.items()}
    assert counts == {kind: {key: len(w) for key, w in by.items()} for kind, by in patched.wrappers.items()}
    assert len(again.additional_models["moma"]) == 1 and len(settings_of(again).subjects) == 1
    assert torch.equal(run(again, subject), first)


def test_a_model_that_is_let_go_is_freed() -> None:
    """Neither the adapter with its kept reference passes, nor a log of masks, holds on to a checkpoint."""
    adapter, model = tiny_adapter(), tiny_model()
    patched, subject = full(model, adapter)
    samples = run(patched, subject)
    assert masks_of(patched, samples)
    gone = [weakref.ref(model.model), weakref.ref(patched), weakref.ref(settings_of(patched))]
    comfy.model_management.unload_all_models()
    del model, patched
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    # What was kept for it goes with the next reference pass.
    run(*full(tiny_model(), adapter))
    assert len(caches_of(adapter).references) == 1
