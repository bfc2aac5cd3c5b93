"""The MLLM's precisions: how close each is, what auto chooses, what is refused."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.mllm import precision as precisions
from comfyui_moma.moma_modules.mllm.checkpoint import LanguageShape, VisionShape
from comfyui_moma.moma_modules.mllm.encode import subject_hidden_state
from comfyui_moma.moma_modules.mllm.model import MllmModule, load_mllm
from comfyui_moma.moma_modules.mllm.precision import Memory, Plan, make_plan, packed_size
from comfyui_moma.moma_modules.mllm.quantize import quantize_rows
from random_weights import SMALL_LLAVA, llava_folder

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
BF16 = torch.bfloat16


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


def hidden(path: Path, precision: str) -> torch.Tensor:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    with torch.inference_mode():
        return subject_hidden_state(load_mllm(path, precision), image, np.ones((64, 64), bool), "car", "A red car.")


@pytest.fixture(scope="module")
def exact(folder: Path) -> torch.Tensor:
    return hidden(folder, "fp32")


@pytest.mark.parametrize(
    ("precision", "least"), [("bf16", 0.9995), ("fp16", 0.9995), ("fp8", 0.998), ("8-bit", 0.9995), ("4-bit", 0.985)]
)
def test_every_precision_is_close_to_fp32(folder: Path, exact: torch.Tensor, precision: str, least: float) -> None:
    ours = hidden(folder, precision)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, exact)
    assert float(torch.cosine_similarity(exact, ours)) >= least


@pytest.mark.parametrize("precision", ["fp8", "8-bit", "4-bit"])
def test_packed_weights_are_as_small_as_planned(folder: Path, precision: str) -> None:
    with torch.inference_mode():
        loaded, plain = load_mllm(folder, precision).loaded, load_mllm(folder, "fp32").loaded
    assert loaded.patcher.model_size() == packed_size(plain.module.state_dict(), precision)
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
        load_mllm(packed, other)
    weights = dict(load_mllm(packed).loaded.module.state_dict())
    assert weights["language.layers.0.mlp.up_proj.weight"].dtype == dtype


@pytest.mark.parametrize("precision", ["8-bit", "4-bit"])
def test_missing_bitsandbytes_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{precision} needs bitsandbytes.*pip install bitsandbytes.*auto or fp8"):
        load_mllm(folder, precision)
    assert load_mllm(folder, "auto").plan.storage is None


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


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ComfyUI says of a card that is fast at bf16."""
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device: device == CARD)


@pytest.mark.usefixtures("card")
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
    chosen = make_plan("auto", published, CARD, Memory(device * 10**9, ram * 10**9))
    assert chosen == plan
    assert words in chosen.summary


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("precision", "size"), [("bf16", "13.8"), ("fp8", "7.4"), ("8-bit", "7.4"), ("4-bit", "4.5")])
def test_a_chosen_precision_is_never_replaced(published: dict[str, torch.Tensor], precision: str, size: str) -> None:
    chosen = make_plan(precision, published, CARD, Memory(0, 0))
    assert chosen == Plan(None if precision == "bf16" else precision, BF16, "")
    assert f"{size} GB, 0.0 GB on the card, the rest streamed" in chosen.summary


def test_a_device_without_fp8_is_named(published: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype.itemsize > 1)
    with pytest.raises(ValueError, match=r"precision: cuda:0 cannot hold fp8\. Choose auto"):
        make_plan("fp8", published, CARD, Memory(10**10, 10**10))
    assert make_plan("auto", published, CARD, Memory(0, 0)).storage is None


@pytest.mark.parametrize(("gain", "dtype"), [(3.0, BF16), (1.1, torch.float32), (0.2, torch.float32)])
def test_auto_on_the_cpu_takes_what_is_faster(
    published: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, gain: float, dtype: torch.dtype
) -> None:
    times = iter([0.0, gain] * 3 + [0.0, 1.0] * 3)
    monkeypatch.setattr(precisions.time, "perf_counter", lambda: next(times))
    plan = make_plan("auto", published, CPU, Memory(0, 0))
    assert plan == Plan(None, dtype, "")
    assert f"bf16 is {gain:.1f} times as fast as fp32 here" in plan.summary
