"""The MLLM computes in what it says: every layer, for every precision, kind of file and device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.mllm.checkpoint import Checkpoint, read_checkpoint
from comfyui_moma.moma_modules.mllm.convert import convert_mllm
from comfyui_moma.moma_modules.mllm.encode import forward
from comfyui_moma.moma_modules.mllm.loading import LoadedMllm, load_checkpoint
from comfyui_moma.moma_modules.mllm.precision import PRECISIONS, Machine, Plan, make_plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.fake_device import CARD, fake_card, without_content
from workbench.random_weights import SMALL_LLAVA, llava_folder

CPU = torch.device("cpu")
SIZE = replace(SMALL_LLAVA, hidden=64, intermediate=128, layers=1, vision_width=64, vision_layers=2, image=56)
IDS = [1, 5, -200, 7, 8]
NAMES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STORED = {"fp8": torch.float8_e4m3fn, "8-bit": torch.int8, "4-bit": torch.uint8, **NAMES}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_dot_product")
FORMS = ["folder", "keep", "fp8", "int8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A checkpoint by dtype and form, made once."""
    made: dict[tuple[str, str], Path] = {}
    base = tmp_path_factory.mktemp("dtypes")

    def file(dtype: str, form: str) -> Path:
        if (dtype, "folder") not in made:
            made[dtype, "folder"] = in_dtype(llava_folder(base / dtype, SIZE), dtype)
        if (dtype, form) not in made:
            made[dtype, form] = base / f"{dtype}_{form}.safetensors"
            convert_mllm(made[dtype, "folder"], made[dtype, form], form, lambda *_: None)
        return made[dtype, form]

    return file


def in_dtype(folder: Path, name: str) -> Path:
    """The checkpoint in that dtype; `mixed`: matrices in fp16, all else in fp32."""

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(NAMES.get(name, torch.float16 if value.ndim == 2 else torch.float32))

    for shard in folder.glob("*.bin"):
        torch.save({key: cast(value) for key, value in torch.load(shard).items()}, shard)
    return folder


def plans(checkpoint: Checkpoint, device: torch.device) -> list[tuple[str, Plan]]:
    """What every precision becomes on machines that are fast at each dtype, as (precision, plan), without repeats."""
    weights = {f"{part}.{k}": v for part in ("language", "vision") for k, v in getattr(checkpoint, part).items()}
    found: dict[Plan, str] = {}
    for dtype in NAMES.values():
        for precision in PRECISIONS:
            try:
                plan = make_plan(precision, weights, Machine(device, 10**12, 10**12, fast_dtype=dtype))
            except ValueError as error:
                assert "is made from 16-bit weights" in str(error)
                continue
            found.setdefault(plan, precision)
    return [(precision, plan) for plan, precision in found.items()]


class Products(TorchDispatchMode):
    """Notes the dtypes that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.startswith(PRODUCTS):
            self.dtypes |= {t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.is_floating_point()}
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[dict[str, set[tuple[torch.dtype, str]]]]:
    """Notes, per submodule, dtypes and devices of all floating-point tensors that go in or come out."""
    seen: dict[str, set[tuple[torch.dtype, str]]] = {}

    def note(name: str, *values: Any) -> None:
        tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        seen.setdefault(name, set()).update((t.dtype, t.device.type) for t in tensors if t.is_floating_point())

    handles = []
    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda _, a, k, n=name: note(n, a, k), with_kwargs=True))
        handles.append(part.register_forward_hook(lambda _, a, out, n=name: note(n, list(tree_leaves(out)))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def look(loaded: LoadedMllm) -> tuple[dict[str, set[tuple[torch.dtype, str]]], set[torch.dtype]]:
    """One forward: what went through each submodule, and what was multiplied."""
    with watched(loaded.module) as seen, Products() as products, torch.inference_mode():
        forward(loaded, torch.randn(1, 3, SIZE.image, SIZE.image), IDS)
    return seen, products.dtypes


def check(loaded: LoadedMllm, precision: str, case: str) -> None:
    """The plan, its summary and what ran agree."""
    plan, module = loaded.plan, loaded.module
    seen, multiplied = look(loaded)
    wanted = {(plan.compute_dtype, loaded.patcher.load_device.type)}
    wrong = {name: found - wanted for name, found in seen.items() if found - wanted}
    assert not wrong, f"{case}, {precision}: {wrong}"
    with_weights = {name for name, part in module.named_modules() if list(part.parameters(recurse=False))}
    assert with_weights <= {name for name in seen if seen[name]}, case
    kept = module.language.layers[0].mlp.up_proj.weight.dtype
    (said,) = [name for name, dtype in STORED.items() if f"{precision}: weights in {name}, " in plan.summary]
    assert kept == STORED[said], case
    assert f"computing in {next(n for n, d in NAMES.items() if d == plan.compute_dtype)} " in plan.summary, case
    in_int8 = "(products in int8, outliers in fp16)" in plan.summary
    assert in_int8 == (plan.storage == "8-bit" and loaded.patcher.load_device.type != "cpu"), case
    assert multiplied <= {plan.compute_dtype, *([torch.float16] if in_int8 else [])}, f"{case}: {multiplied}"
    assert plan.compute_dtype in multiplied, case


@pytest.mark.parametrize(("dtype", "form"), [*product(NAMES, FORMS), ("mixed", "folder")])
def test_every_layer_computes_in_the_planned_dtype(files: Callable[[str, str], Path], dtype: str, form: str) -> None:
    checkpoint = read_checkpoint(files(dtype, form))
    found = plans(checkpoint, CPU)
    assert {plan.compute_dtype for _, plan in found} == set(NAMES.values())
    for precision, plan in found:
        check(load_checkpoint(checkpoint, plan, CPU), precision, f"{dtype} {form} on the CPU")


@pytest.mark.parametrize("form", ["folder", "fp8", "int8"])
@pytest.mark.parametrize("dtype", NAMES)
def test_every_layer_computes_in_the_planned_dtype_on_a_card(
    files: Callable[[str, str], Path], dtype: str, form: str
) -> None:
    checkpoint = read_checkpoint(files(dtype, form))
    for precision, plan in plans(checkpoint, CARD):
        with fake_card():
            loaded = load_checkpoint(without_content(checkpoint), plan, CARD)
            loaded.patcher.partially_load(CARD, 0.5 * loaded.patcher.model_size())
            check(loaded, precision, f"{dtype} {form} on a card")
