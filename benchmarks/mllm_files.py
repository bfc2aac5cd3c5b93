"""mllm's files: from a name to the first hidden state, with the file on the disk alone and in memory, per form.

Full-size layers, but few: four files of all 32 would take 40 GB of disk.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from measure import seconds_of
from memory import MemoryMeter
from workload import PICTURE, WORD

if TYPE_CHECKING:
    from comfyui_moma.moma_modules.mllm.loading import Mllm

    from workbench.random_weights import LlavaSize

BASELINE = "bf16"
FORMS = {
    "fp16": ("keep", "auto"),
    BASELINE: ("bf16", "auto"),
    "fp8": ("fp8", "auto"),
    "int8": ("int8", "auto"),
    "fp8, kept so": ("fp8", "fp8"),
    "int8, kept so": ("int8", "8-bit"),
}
"""By name what the file is converted to and the precision chosen at the node."""

LAYERS, ROUNDS = 3, 2


def measure(llava: "LlavaSize") -> dict[str, Any]:
    """`layers`, and per form `warm_s`, `next_s` (another prompt after it), `peak_mb` of it; `cold_s` where the system
    can be told to forget a file.
    """
    from comfyui_moma.moma_modules.mllm.convert import convert_mllm

    from workbench.random_weights import llava_folder

    with tempfile.TemporaryDirectory() as place:
        source = llava_folder(Path(place) / "llava", llava)
        files = {}
        for precision in dict(FORMS.values()):
            files[precision] = Path(place) / f"{precision}.safetensors"
            convert_mllm(source, files[precision], precision, lambda *_: None)
        shutil.rmtree(source)  # its pages need no memory any more
        _look(files["keep"], "auto")  # imports and kernels
        found: dict[str, dict[str, list[float]]] = {name: {} for name in FORMS}
        for _ in range(ROUNDS):  # by turns, so that a slow moment hits all
            for name, (precision, chosen) in FORMS.items():
                for figure, value in _figures(files[precision], chosen).items():
                    found[name].setdefault(figure, []).append(value)
        return {
            "layers": llava.layers,
            **{name: {figure: median(values) for figure, values in figures.items()} for name, figures in found.items()},
        }


def _figures(file: Path, precision: str) -> dict[str, float]:
    figures = {}
    if hasattr(os, "posix_fadvise"):
        _forget(file)
        figures["cold_s"] = _look(file, precision)["look_s"]
    warm = _look(file, precision)
    return {**figures, "warm_s": warm["look_s"], "next_s": warm["next_s"], "peak_mb": warm["peak_mb"]}


def _look(file: Path, precision: str) -> dict[str, float]:
    """Seconds of a first look with a model that nothing is known of, and of another prompt; MiB at most."""
    from comfyui_moma.moma_modules.mllm.encode import subject_hidden_states
    from comfyui_moma.moma_modules.mllm.loading import load_mllm

    picture = np.random.default_rng(0).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
    mask = np.ones((PICTURE, PICTURE), dtype=bool)
    models: list[Mllm] = []

    def look(prompt: str) -> None:
        models[:] = models or [load_mllm(file, precision)]
        list(subject_hidden_states(models[0], picture, mask, [(WORD, prompt)]))

    meter = MemoryMeter()
    before = meter.now_mb()
    with torch.inference_mode():
        seconds = seconds_of(lambda: look(f"A {WORD} in autumn with falling leaves."))
        peak = meter.peak_mb() - before
        further = seconds_of(lambda: look(f"A {WORD} in the snow, at night."))
    models.clear()
    gc.collect()
    return {"look_s": seconds, "next_s": further, "peak_mb": peak}


def _forget(file: Path) -> None:
    """Have the system drop what it holds of a file that nothing has mapped."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # only what is on the disk can be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
