"""mllm: loading the language model and one look at a picture, per precision.

On a CPU the full-size model is measured with one and with five of its language layers, and extrapolated to all; in fp32
and bf16, which `auto` chooses between there.
"""

import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from arithmetic import flops_per_second, matrix_flops
from measure import seconds_of
from memory import MemoryMeter
from session import Session
from workload import PICTURE, WORD

if TYPE_CHECKING:
    from comfyui_moma.moma_modules.mllm.loading import Mllm

    from workbench.random_weights import LlavaSize

BASELINE = "fp32"
ON_A_CPU = (BASELINE, "bf16")
"""In what the full-size model is measured there."""

FEW, MORE = 1, 5
_CASE = re.compile(r"(?P<precision>.+) (?P<size>small|full|\d+ layers)")


def processes(precisions: list[str], full: bool, cuda: bool) -> list[list[str]]:
    """Cases `PRECISION SIZE`, by the process they run in: the small model's in one, every other in its own."""
    small = [f"{precision} small" for precision in precisions]
    sizes = (["full"] if cuda else [f"{FEW} layers", f"{MORE} layers"]) if full else []
    sized = precisions if cuda else [name for name in precisions if name in ON_A_CPU]
    return [small, *([f"{precision} {size}"] for size in sizes for precision in sized)]


def measure(session: Session, case: str) -> dict[str, Any]:
    """`load_s`, `forward_s`, `peak_mb`; `flops` of the forward's products, `flops_per_s` of such a product alone, and
    `computed_in`, the dtype that the last matrix was given.

    Or `refused`, the message, where a precision needs what is not there.
    """
    from workbench.random_weights import FULL_LLAVA, SMALL_LLAVA, llava_folder

    found = _CASE.fullmatch(case)
    assert found is not None
    size = found["size"]
    sizes = {"small": SMALL_LLAVA, "full": FULL_LLAVA}
    llava = sizes.get(size) or FULL_LLAVA.with_layers(int(size.split()[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = llava_folder(Path(folder), llava)
        try:
            return _times(path, llava, found["precision"], session.plan.mllm_rounds)
        except (ValueError, ImportError) as error:
            return {"refused": str(error)}


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per size and figure the baseline precision's value, and the other precisions as ratios to it."""
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    for case, found in measured.items():
        match = _CASE.fullmatch(case)
        assert match is not None
        sizes.setdefault(match["size"], {})[match["precision"]] = found
    if f"{MORE} layers" in sizes:
        sizes["extrapolated full"] = _extrapolated(sizes.pop(f"{FEW} layers"), sizes.pop(f"{MORE} layers"))
    return {size: _against_baseline(found) for size, found in sizes.items()}


def _times(folder: Path, size: "LlavaSize", precision: str, rounds: int) -> dict[str, Any]:
    from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
    from comfyui_moma.moma_modules.mllm.loading import load_mllm

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
        peak = meter.peak_mb() - before
        given: list[torch.dtype] = []
        last = mllm.loaded.module.language.layers[-1].mlp.down_proj
        with last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype)):
            flops = matrix_flops(look)
        forward, speed = [], []
        for _ in range(rounds):  # by turns, so that a slow moment hits both
            forward.append(seconds_of(look))
            speed.append(_largest_product(mllm, size))
    return {
        "load_s": max(first - median(forward), 0.0),
        "forward_s": median(forward),
        "peak_mb": peak,
        "flops": flops,
        "flops_per_s": median(speed),
        "computed_in": str(given[0]).removeprefix("torch."),
    }


def _largest_product(mllm: "Mllm", size: "LlavaSize") -> float:
    """Operations per second in the largest product of a language layer."""
    plan, device = mllm.loaded.plan, mllm.loaded.patcher.load_device
    return flops_per_second((size.image // 14) ** 2, size.hidden, size.intermediate, plan.compute_dtype, device)


def _extrapolated(few: dict[str, dict[str, Any]], more: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from workbench.random_weights import FULL_LLAVA

    def at_full(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        if "refused" in first:
            return first
        layers = (FULL_LLAVA.layers - FEW) / (MORE - FEW)
        # Not the loading: of so few layers it is lost in the noise of the look that it is subtracted from.
        grown = {
            name: first[name] + layers * (second[name] - first[name]) for name in ("forward_s", "peak_mb", "flops")
        }
        fastest = max(first["flops_per_s"], second["flops_per_s"])
        return {**grown, "flops_per_s": fastest, "computed_in": second["computed_in"]}

    return {precision: at_full(found, more[precision]) for precision, found in few.items()}


def _against_baseline(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per figure the baseline's value and ratios to it; the forward against its own arithmetic too."""
    refused = {precision: values["refused"] for precision, values in found.items() if "refused" in values}
    ran = {precision: values for precision, values in found.items() if precision not in refused}
    figures: dict[str, Any] = {
        figure: {BASELINE: base, **{name: ran[name][figure] / base for name in ran if name != BASELINE}}
        for figure, base in ran[BASELINE].items()
        if not figure.startswith("flops") and figure != "computed_in"
    }
    arithmetic = {name: values["flops"] / values["flops_per_s"] for name, values in ran.items()}
    figures["arithmetic_s"] = arithmetic
    figures["forward_over_arithmetic"] = {name: ran[name]["forward_s"] / arithmetic[name] for name in ran}
    figures["computed_in"] = {name: values["computed_in"] for name, values in ran.items()}
    return {**figures, "refused": refused} if refused else figures
