"""mllm: loading the language model, a first look at a picture, its next prompt and ten prompts at once, per precision.

On a CPU the full-size model is measured with one and with five of its language layers, and extrapolated to all; in fp32
and bf16, which `auto` chooses between there. And the forms of its files, see `mllm_files.py`.
"""

import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import mllm_files
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

PROMPTS = (
    f"A {WORD} in autumn with falling leaves.",
    f"A {WORD} in the snow, at night.",
    f"A {WORD} on a beach at sunset.",
    f"A {WORD} on a desk in a library.",
    f"A {WORD} made of glass.",
    f"A {WORD} under water, with fish around it.",
    f"A watercolour painting of a {WORD}.",
    f"A {WORD} in front of the Eiffel tower.",
    f"Two children beside a {WORD} in a park.",
    f"A {WORD} on the moon.",
)
"""Ten for one picture; the second is the next one after the first."""

FEW, MORE = 1, 5
FILES = "files"
_CASE = re.compile(r"(?P<precision>.+) (?P<size>small|full|\d+ layers)")


def processes(precisions: list[str], full: bool, cuda: bool) -> list[list[str]]:
    """Cases `PRECISION SIZE` and `files SIZE`, by the process they run in: the small model's in one, every other in its
    own.
    """
    small = [*(f"{precision} small" for precision in precisions), *([] if full else [f"{FILES} small"])]
    sizes = (["full"] if cuda else [f"{FEW} layers", f"{MORE} layers"]) if full else []
    sized = precisions if cuda else [name for name in precisions if name in ON_A_CPU]
    files = [[f"{FILES} {mllm_files.LAYERS} layers"]] if full else []
    return [small, *([f"{precision} {size}"] for size in sizes for precision in sized), *files]


def measure(session: Session, case: str) -> dict[str, Any]:
    """`load_s`, `peak_mb`, `forward_s` (a first look), `next_s`, `ten_s`, `cast_s` (`_cast_all`); `flops` of a first
    look's products, `flops_per_s` of such a product alone, and `computed_in`, the dtype that the last matrix was given.

    Or `refused`, the message, where a precision needs what is not there. Of `files`, see `mllm_files.measure`.
    """
    from workbench.random_weights import FULL_LLAVA, SMALL_LLAVA, llava_folder

    found = _CASE.fullmatch(case)
    assert found is not None
    size = found["size"]
    sizes = {"small": SMALL_LLAVA, "full": FULL_LLAVA}
    llava = sizes.get(size) or FULL_LLAVA.with_layers(int(size.split()[0]))
    if found["precision"] == FILES:
        return mllm_files.measure(llava)
    with tempfile.TemporaryDirectory() as folder:
        path = llava_folder(Path(folder), llava)
        try:
            return _times(path, llava, found["precision"], session.plan.mllm_rounds)
        except (ValueError, ImportError) as error:
            return {"refused": str(error)}


def result(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per size and figure the baseline precision's value, and the others as ratios to it; `files` as measured."""
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    files: dict[str, Any] = {}
    for case, found in measured.items():
        match = _CASE.fullmatch(case)
        assert match is not None
        if match["precision"] == FILES:
            files = {FILES: found}
            continue
        sizes.setdefault(match["size"], {})[match["precision"]] = found
    if f"{MORE} layers" in sizes:
        sizes["extrapolated full"] = _extrapolated(sizes.pop(f"{FEW} layers"), sizes.pop(f"{MORE} layers"))
    return {**{size: _against_baseline(found) for size, found in sizes.items()}, **files}


def _times(folder: Path, size: "LlavaSize", precision: str, rounds: int) -> dict[str, Any]:
    from comfyui_moma.moma_modules.mllm.encode import subject_hidden_states
    from comfyui_moma.moma_modules.mllm.loading import load_mllm

    pictures = np.random.default_rng(0)
    shown: list[np.ndarray] = []
    mask = np.ones((PICTURE, PICTURE), dtype=bool)
    meter = MemoryMeter()
    before = meter.now_mb()
    start = time.perf_counter()
    mllm = load_mllm(folder, precision)

    def look(*prompts: str) -> None:
        """At a picture that was not seen before."""
        shown[:] = [pictures.integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)]
        look_again(*prompts)

    def look_again(*prompts: str) -> None:
        list(subject_hidden_states(mllm, shown[0], mask, [(WORD, prompt) for prompt in prompts]))

    with torch.inference_mode():
        look(PROMPTS[0])
        first = time.perf_counter() - start
        peak = meter.peak_mb() - before
        given: list[torch.dtype] = []
        last = mllm.loaded.module.language.layers[-1].mlp.down_proj
        with last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype)):
            flops = matrix_flops(lambda: look(PROMPTS[0]))
        times: dict[str, list[float]] = {"forward_s": [], "next_s": [], "ten_s": [], "cast_s": []}
        speed = []
        for _ in range(rounds):  # by turns, so that a slow moment hits all
            times["forward_s"].append(seconds_of(lambda: look(PROMPTS[0])))
            times["next_s"].append(seconds_of(lambda: look_again(PROMPTS[1])))
            times["ten_s"].append(seconds_of(lambda: look(*PROMPTS)))
            times["cast_s"].append(seconds_of(lambda: _cast_all(mllm)))
            speed.append(_largest_product(mllm, size))
    medians = {name: median(seconds) for name, seconds in times.items()}
    return {
        **medians,
        "load_s": max(first - medians["forward_s"], 0.0),
        "peak_mb": peak,
        "flops": flops,
        "flops_per_s": median(speed),
        "computed_in": str(given[0]).removeprefix("torch."),
    }


def _cast_all(mllm: "Mllm") -> None:
    """Read every matrix of the language layers and cast it to what is computed in: what one token costs at least.

    Some rows at a time and through float32, which is the fastest way; into the same memory, as new pages are slow.
    """
    from comfyui_moma.moma_modules.mllm.blocks import ROWS

    weights = [
        module.weight for module in mllm.loaded.module.language.layers.modules() if isinstance(module, torch.nn.Linear)
    ]
    widest = max(weight.shape[1] for weight in weights)
    wide = torch.empty(ROWS, widest, device=mllm.loaded.patcher.load_device)
    narrow = torch.empty_like(wide, dtype=mllm.loaded.plan.compute_dtype)
    for weight in weights:
        for rows in weight.split(ROWS):
            here = slice(len(rows)), slice(rows.shape[1])
            wide[here].copy_(rows)
            if narrow.dtype != wide.dtype:
                narrow[here].copy_(wide[here])


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
            name: first[name] + layers * (second[name] - first[name])
            for name in ("forward_s", "next_s", "ten_s", "cast_s", "peak_mb", "flops")
        }
        fastest = max(first["flops_per_s"], second["flops_per_s"])
        return {**grown, "flops_per_s": fastest, "computed_in": second["computed_in"]}

    return {precision: at_full(found, more[precision]) for precision, found in few.items()}


def _against_baseline(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per figure the baseline's value and ratios to it; in each precision a first look against its own arithmetic, and
    further prompts against the first look.
    """
    refused = {precision: values["refused"] for precision, values in found.items() if "refused" in values}
    ran = {precision: values for precision, values in found.items() if precision not in refused}
    figures: dict[str, Any] = {
        figure: {BASELINE: base, **{name: ran[name][figure] / base for name in ran if name != BASELINE}}
        for figure, base in ran[BASELINE].items()
        if figure in ("load_s", "forward_s", "peak_mb")
    }
    arithmetic = {name: values["flops"] / values["flops_per_s"] for name, values in ran.items()}
    figures["arithmetic_s"] = arithmetic
    figures["forward_over_arithmetic"] = {name: ran[name]["forward_s"] / arithmetic[name] for name in ran}
    figures["next_prompt"] = {name: values["next_s"] / values["forward_s"] for name, values in ran.items()}
    figures["ten_prompts"] = {name: values["ten_s"] / values["forward_s"] for name, values in ran.items()}
    figures["next_over_casting"] = {name: values["next_s"] / values["cast_s"] for name, values in ran.items()}
    figures["computed_in"] = {name: values["computed_in"] for name, values in ran.items()}
    return {**figures, "refused": refused} if refused else figures
