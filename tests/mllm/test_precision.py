"""The MLLM's precisions: how close each is, what auto chooses, what is refused."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.mllm.checkpoint import read_checkpoint
from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.moma_modules.mllm.module import MllmModule
from comfyui_moma.moma_modules.mllm.precision import PRECISIONS, Machine, Plan, cpu_bf16_gain, make_plan, packed_size
from comfyui_moma.moma_modules.mllm.weights import LanguageShape, VisionShape, quantize_rows

from workbench.random_weights import SMALL_LLAVA, llava_folder

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
BF16 = torch.bfloat16
SLOW, FAST = (Machine(CPU, 10**12, 10**12, bf16_gain=gain) for gain in (0.5, 3.0))
"""CPUs on which bf16 is slow and fast."""


Change = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of width 512 with matrices of LLaMA's own initial scale, a standard deviation of 0.02.

    The embeddings have 1: as in a trained model, a layer adds little to what it reads.
    """
    path = llava_folder(
        tmp_path_factory.mktemp("mid") / "llava", replace(SMALL_LLAVA, hidden=512, intermediate=1024, layers=8)
    )
    rewrite(path, "model.layers.", lambda key, value: {key: value * 0.02 * value.shape[1] ** 0.5})
    return rewrite(path, "model.embed_tokens.", lambda key, value: {key: value * 512**0.5})


def rewrite(path: Path, prefix: str, change: Change) -> Path:
    """Replace the matrices below `prefix` by what `change(key, float32 matrix)` makes of them."""
    index_file = path / "pytorch_model.bin.index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for shard in sorted(set(index["weight_map"].values())):
        weights = {}
        for key, value in torch.load(path / shard, weights_only=True).items():
            weights |= change(key, value.float()) if key.startswith(prefix) and value.ndim == 2 else {key: value}
        halves = {
            key: value.half() if value.dtype == torch.float32 and value.ndim == 2 else value
            for key, value in weights.items()
        }
        torch.save(halves, path / shard)
        index["weight_map"] |= dict.fromkeys(weights, shard)
    index_file.write_text(json.dumps(index), encoding="utf-8")
    return path


def packed_copy(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The checkpoint with the layers' matrices in 8 bit, as the converter writes it."""

    def pack(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, scale = quantize_rows(value, dtype)
        return {key: packed, f"{key}_scale": scale}

    return rewrite(Path(shutil.copytree(folder, target)), "model.layers.", pack)


def hidden(path: Path, precision: str, machine: Machine = SLOW) -> torch.Tensor:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    mllm = load_mllm(path, precision, machine=machine)
    with torch.inference_mode():
        return subject_hidden_state(mllm, image, np.ones((64, 64), bool), "car", "A red car.")


@pytest.fixture(scope="module")
def exact(folder: Path) -> torch.Tensor:
    return hidden(folder, "fp32")


@pytest.mark.parametrize(
    ("precision", "least"), [("bf16", 0.9995), ("fp16", 0.9995), ("fp8", 0.998), ("8-bit", 0.9995), ("4-bit", 0.985)]
)
@pytest.mark.parametrize("machine", [SLOW, FAST], ids=["slow", "fast"])
def test_every_precision_is_close_to_fp32(
    folder: Path, exact: torch.Tensor, precision: str, least: float, machine: Machine
) -> None:
    ours = hidden(folder, precision, machine)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, exact)
    assert float(torch.cosine_similarity(exact, ours)) >= least


@pytest.mark.parametrize("machine", [SLOW, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_as_large_as_planned(folder: Path, precision: str, machine: Machine) -> None:
    with torch.inference_mode():
        loaded = load_mllm(folder, precision, machine=machine).loaded
    read = read_checkpoint(folder)
    weights = {f"{p}.{k}": v for p in ("language", "vision", "projector") for k, v in getattr(read, p).items()}
    plan = loaded.plan
    assert loaded.patcher.model_size() == packed_size(weights, plan.storage, plan.compute_dtype)
    if plan.storage is None:
        return
    for key, value in loaded.module.state_dict().items():
        kept = {"fp8": torch.float8_e4m3fn, "8-bit": torch.int8, "4-bit": torch.uint8}[precision]
        is_matrix = key.startswith("language.layers.") and key.endswith("proj.weight")
        assert value.dtype == (kept if is_matrix else torch.float32 if key.endswith("_scale") else value.dtype)
        assert is_matrix or key.endswith("_scale") or value.dtype.itemsize >= 2, key


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_files_in_8_bit_run_without_bitsandbytes(
    folder: Path, exact: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    packed = packed_copy(folder, tmp_path / "llava", dtype)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = {torch.int8: "8-bit", torch.float8_e4m3fn: "fp8"}[dtype]
    results = [hidden(packed, precision) for precision in ("auto", name, "fp16")]
    assert all(float(torch.cosine_similarity(exact, result)) >= 0.998 for result in results)
    assert torch.equal(results[0], results[1])
    other = {"8-bit": "4-bit", "fp8": "8-bit"}[name]
    with pytest.raises(
        ValueError, match=rf"precision: {other} is made from 16-bit .* in {name}\. Choose auto or {name}"
    ):
        load_mllm(packed, other, machine=SLOW)
    weights = dict(load_mllm(packed, machine=SLOW).loaded.module.state_dict())
    assert weights["language.layers.0.mlp.up_proj.weight"].dtype == dtype


@pytest.mark.parametrize("precision", ["8-bit", "4-bit"])
def test_missing_bitsandbytes_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{precision} needs bitsandbytes.*pip install bitsandbytes.*auto or fp8"):
        load_mllm(folder, precision)
    assert load_mllm(folder, "auto", machine=FAST).plan.storage is None


def test_scales_of_a_wrong_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    packed = packed_copy(folder, tmp_path / "llava", torch.int8)
    for shard in packed.glob("*.bin"):
        weights = torch.load(shard, weights_only=True)
        torch.save({key: v[:-1] if key.endswith("_scale") else v for key, v in weights.items()}, shard)
    with pytest.raises(
        ValueError, match=r"weight_scale'.* is torch\.float32 \(511,\); expected finite float32 \(512,\)"
    ):
        load_mllm(packed)


def test_integers_without_scales_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "llava"))
    rewrite(copy, "model.layers.", lambda key, value: {key: quantize_rows(value, torch.int8)[0]})
    with pytest.raises(ValueError, match=r"weight_scale', which scales an 8-bit weight, is missing"):
        load_mllm(copy)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """The weights of the released checkpoint, without content."""
    module = MllmModule(
        LanguageShape(4096, 11008, 32, 32, 32, 32000, 1e-5, 10000.0), VisionShape(1024, 4096, 23, 16, 14, 336)
    )
    return {key: value.half() for key, value in module.state_dict().items()}


def card(free: int, ram: int, dtype: torch.dtype = BF16) -> Machine:
    """A card that is fastest at `dtype`, with these bytes free there and in RAM."""
    return Machine(CARD, free, ram, fast_dtype=dtype)


@pytest.mark.parametrize(
    ("device", "ram", "plan", "words"),
    [
        (22, 30, Plan(None, BF16, ""), "auto: weights in fp16, computing in bf16 on cuda:0; 13.8 GB, all on the card"),
        (22, 8, Plan(None, BF16, ""), "13.8 GB, all on the card"),
        (6, 30, Plan(None, BF16, ""), "13.8 GB, 6.0 GB on the card, the rest streamed"),
        (
            6,
            10,
            Plan("fp8", BF16, ""),
            "because the file's 13.8 GB fit neither there nor in 10.0 GB of free RAM; 7.4 GB",
        ),
        (8, 10, Plan("fp8", BF16, ""), "7.4 GB, all on the card"),
    ],
)
def test_auto_chooses_by_memory(
    published: dict[str, torch.Tensor], device: int, ram: int, plan: Plan, words: str
) -> None:
    chosen = make_plan("auto", published, card(device * 10**9, ram * 10**9))
    assert chosen == plan
    assert words in chosen.summary


@pytest.mark.parametrize(("precision", "size"), [("bf16", "13.8"), ("fp8", "7.4"), ("8-bit", "7.4"), ("4-bit", "4.5")])
def test_a_chosen_precision_is_never_replaced(published: dict[str, torch.Tensor], precision: str, size: str) -> None:
    chosen = make_plan(precision, published, card(0, 0))
    assert chosen == Plan(None if precision == "bf16" else precision, BF16, "")
    assert f"{size} GB, 0.0 GB on the card, the rest streamed" in chosen.summary


def test_a_device_without_fp8_is_named(published: dict[str, torch.Tensor]) -> None:
    old = replace(card(10**10, 10**10), holds_fp8=False)
    with pytest.raises(ValueError, match=r"precision: cuda:0 cannot hold fp8\. Choose auto"):
        make_plan("fp8", published, old)
    assert make_plan("auto", published, replace(old, free=0, ram=0)).storage is None


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_auto_takes_what_the_card_is_fast_at(published: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert make_plan("auto", published, card(10**12, 10**12, dtype)) == Plan(None, dtype, "")


@pytest.mark.parametrize(("gain", "dtype"), [(3.0, BF16), (1.1, torch.float32), (0.2, torch.float32)])
@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_the_faster_is_taken_on_a_cpu(
    published: dict[str, torch.Tensor], precision: str, gain: float, dtype: torch.dtype
) -> None:
    plan = make_plan(precision, published, Machine(CPU, 0, 0, bf16_gain=gain))
    assert plan == Plan(None if precision == "auto" else precision, dtype, "")
    assert f"on cpu (bf16 is {gain:.1f} times as fast as fp32 here); " in plan.summary


@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_a_chosen_dtype_is_taken_whatever_is_faster(published: dict[str, torch.Tensor], gain: float) -> None:
    for precision, dtype in (("bf16", BF16), ("fp16", torch.float16), ("fp32", torch.float32)):
        plan = make_plan(precision, published, Machine(CPU, 0, 0, bf16_gain=gain))
        assert plan == Plan(None, dtype, "") and "times as fast" not in plan.summary


def test_this_machine_is_measured_once() -> None:
    """Two loads must agree, so that they share their weights, however the machine is disturbed between them."""
    one, two = Machine.measure(CPU), Machine.measure(CPU)
    assert one.bf16_gain == two.bf16_gain == cpu_bf16_gain() > 0
    assert one.free > 0 and one.best_dtype in (BF16, torch.float32)
