"""mllm: loading the language model and one look at a picture, per precision.

On a CPU the full-size model is measured with one and with two of its language layers, and extrapolated to all.
"""

import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import seconds_of
from memory import MemoryMeter
from session import Session
from workload import PICTURE, WORD

BASELINE = "fp32"
_CASE = re.compile(r"(?P<precision>.+) (?P<size>small|full|\d+ layers)")


def processes(precisions: list[str], full: bool, cuda: bool) -> list[list[str]]:
    """Cases `PRECISION SIZE`, by the process they run in: the small model's in one, every other in its own."""
    small = [f"{precision} small" for precision in precisions]
    sizes = (["full"] if cuda else ["1 layers", "2 layers"]) if full else []
    return [small, *([f"{precision} {size}"] for size in sizes for precision in precisions)]


def measure(session: Session, case: str) -> dict[str, Any]:
    """`load_s`, `forward_s` and `peak_mb`; or `refused`, the message, where a precision needs what is not there."""
    from random_weights import FULL_LLAVA, SMALL_LLAVA, llava_folder

    found = _CASE.fullmatch(case)
    assert found is not None
    size = found["size"]
    sizes = {"small": SMALL_LLAVA, "full": FULL_LLAVA}
    llava = sizes.get(size) or FULL_LLAVA.with_layers(int(size.split()[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = llava_folder(Path(folder), llava)
        try:
            return _times(path, found["precision"], session.plan.mllm_rounds)
        except (ValueError, ImportError) as error:
            return {"refused": str(error)}


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per size and figure the baseline precision's value, and the other precisions as ratios to it."""
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    for case, found in measured.items():
        match = _CASE.fullmatch(case)
        assert match is not None
        sizes.setdefault(match["size"], {})[match["precision"]] = found
    if "2 layers" in sizes:
        sizes["full, extrapolated"] = _extrapolated(sizes.pop("1 layers"), sizes.pop("2 layers"))
    return {size: _against_baseline(found) for size, found in sizes.items()}


def _times(folder: Path, precision: str, rounds: int) -> dict[str, float]:
    from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
    from comfyui_moma.moma_modules.mllm.model import load_mllm

    image = np.random.default_rng(0).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
    mask = np.ones((PICTURE, PICTURE), dtype=bool)
    meter = MemoryMeter()
    before = meter.now_mb()
    start = time.perf_counter()
    mllm = load_mllm(folder, precision)

    def look() -> object:
        return subject_hidden_state(mllm, image, mask, WORD, f"A {WORD} in autumn with falling leaves.")

    with torch.inference_mode():
        look()
        first = time.perf_counter() - start
        forward = median(seconds_of(look) for _ in range(rounds))
    return {"load_s": max(first - forward, 0.0), "forward_s": forward, "peak_mb": meter.peak_mb() - before}


def _extrapolated(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from random_weights import FULL_LLAVA

    def at_full(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        if "refused" in first:
            return first
        return {name: value + (FULL_LLAVA.layers - 1) * (second[name] - value) for name, value in first.items()}

    return {precision: at_full(found, two[precision]) for precision, found in one.items()}


def _against_baseline(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    base = found[BASELINE]
    figures: dict[str, Any] = {
        figure: {
            BASELINE: value,
            **{
                precision: values[figure] / value
                for precision, values in found.items()
                if precision != BASELINE and "refused" not in values
            },
        }
        for figure, value in base.items()
    }
    refused = {precision: values["refused"] for precision, values in found.items() if "refused" in values}
    return {**figures, "refused": refused} if refused else figures
