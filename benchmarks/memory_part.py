"""memory: the whole graph from checkpoint to picture, every configuration in a process of its own.

The language model is not in it: a saved subject goes without, and the part `mllm` measures it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfyui_source import cache_dir
from measure import CFG
from memory import MemoryMeter
from session import Session
from workload import PICTURE, WORD, Scene, Workload, moma_model, prompts, random_adapter, subjects

from workbench.random_weights import SD15, sd15_checkpoint

STEPS = 2


@dataclass(frozen=True)
class Graph:
    """What the sampler and the decoder need; `vae` is None for the tiny model."""

    model: Any
    positive: list
    negative: list
    vae: Any


def measure(session: Session, case: str) -> dict[str, float]:
    """MiB: `sampling` in use in the middle of a run, `peak_sampling` and `peak` of the whole graph."""
    import comfy.sample

    checkpoint = None if session.plan.tiny else sd15_checkpoint(cache_dir())  # made the first time, before measuring
    meter = MemoryMeter()
    with torch.inference_mode():
        graph = _tiny_graph(session, case) if checkpoint is None else _graph(checkpoint, case)
        building = meter.peak_mb()
        meter.reset()
        latent = torch.zeros(1, 4, *session.plan.memory_size)
        noise = comfy.sample.prepare_noise(latent, 1)
        levels: list[float] = []
        samples = comfy.sample.sample(
            graph.model,
            noise,
            STEPS,
            CFG,
            "euler",
            "normal",
            graph.positive,
            graph.negative,
            latent,
            seed=1,
            disable_pbar=True,
            callback=lambda *_: levels.append(meter.now_mb()),
        )
        sampling = meter.peak_mb()
        meter.reset()
        if graph.vae is not None:
            graph.vae.decode(samples)
        decoding = meter.peak_mb()
    return {"sampling_mb": levels[0], "peak_sampling_mb": sampling, "peak_mb": max(building, sampling, decoding)}


def result(measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Per figure `plain` in MiB, the other configurations as ratios to it."""
    plain = measured["plain"]
    return {
        figure: {
            "plain": value,
            **{case: found[figure] / value for case, found in measured.items() if case != "plain"},
        }
        for figure, value in plain.items()
    }


def _graph(checkpoint: Path, case: str) -> Graph:
    """The nodes' own work on a full-size checkpoint with random weights."""
    import comfy.sd
    from comfyui_moma.moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE
    from comfyui_moma.nodes.conditioning import TextEncode
    from comfyui_moma.nodes.patches import ApplyAdapter, SelfAttnShortcut

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    if case == "plain":
        return Graph(model, clip.encode_from_tokens_scheduled(clip.tokenize(f"A {WORD}.")), negative, vae)
    workload = Workload(model, random_adapter(SD15), SD15, PICTURE // 8)
    adapter, subject = workload.adapter, subjects(workload, Scene())[0]
    positive = TextEncode.execute(clip, subject, f"A {WORD}.", PROMPT_TEMPLATE).result[0]
    if case in ("apply", "both"):
        model = ApplyAdapter.execute(model, adapter, subject, 1.0, 0.0, 1.0).result[0]
    if case in ("shortcut", "both"):
        model = SelfAttnShortcut.execute(model, adapter, subject, vae, clip, 1.0, 0.05, 1.0, 0).result[0]
    return Graph(model, positive, negative, vae)


def _tiny_graph(session: Session, case: str) -> Graph:
    positive, negative = prompts(session.workload, Scene())
    model = session.workload.model
    if case != "plain":
        model = moma_model(session.workload, Scene(), case != "shortcut", case != "apply")
    return Graph(model, positive, negative, None)
