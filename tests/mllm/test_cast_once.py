"""On a CPU that is fast at bf16, weights of another dtype are cast to it once where RAM has room."""

from dataclasses import replace
from pathlib import Path

import comfy.utils
import pytest
import torch
from comfyui_moma.moma_modules.mllm import leaves
from comfyui_moma.moma_modules.mllm.blocks import cast_in_blocks
from comfyui_moma.moma_modules.mllm.convert import convert_mllm
from comfyui_moma.moma_modules.mllm.encode import forward
from comfyui_moma.moma_modules.mllm.loading import Mllm, load_mllm
from comfyui_moma.moma_modules.mllm.module import MllmModule
from comfyui_moma.moma_modules.mllm.precision import Machine, make_plan, packed_size
from comfyui_moma.moma_modules.mllm.weights import LanguageShape, VisionShape

from workbench.random_weights import llava_folder
from workbench.scene import close

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROOMY = Machine(CPU, 10**12, 10**12, bf16_gain=3.0)
TIGHT = replace(ROOMY, free=0, ram=0)

PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
IDS = [1, 5, 9, -200, 7, 8]


@pytest.fixture(scope="module", params=["keep", "bf16", "fp8", "int8"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file in each form; `keep` is in fp16, as published."""
    folder = tmp_path_factory.mktemp("llava")
    target = folder / f"{request.param}.safetensors"
    convert_mllm(llava_folder(folder / "llava"), target, request.param, lambda *_: None)
    return target


def look(mllm: Mllm) -> torch.Tensor:
    with torch.inference_mode():
        return forward(mllm.loaded, PIXELS, IDS)


def test_no_look_casts_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_each, once = load_mllm(path, machine=TIGHT), load_mllm(path, machine=ROOMY)
    in_file = {"keep": "fp16", "bf16": "bf16", "fp8": "fp8", "int8": "8-bit"}[path.stem]
    assert once.plan.cast_once == (in_file != "bf16") and not at_each.plan.cast_once
    table = {mllm.loaded.module.language.embed_tokens.weight.dtype for mllm in (at_each, once)}
    assert len(table) == 1  # of which a look takes some rows only
    expected = look(at_each)
    matrices = [part for part in once.loaded.module.modules() if isinstance(part, torch.nn.Linear)]
    assert {part.weight.dtype for part in matrices} == {BF16}
    monkeypatch.setattr(leaves, "product_in_blocks", None)
    assert close(look(once), expected, 2e-2)
    if in_file != "bf16":
        with pytest.raises(TypeError):
            look(at_each)


def test_the_weights_are_those_that_each_look_would_cast(path: Path) -> None:
    once, at_each = load_mllm(path, machine=ROOMY), load_mllm(path, machine=TIGHT)
    for (name, ours), (_, theirs) in zip(
        once.loaded.module.named_modules(), at_each.loaded.module.named_modules(), strict=True
    ):
        if isinstance(theirs, torch.nn.Linear):
            scale = getattr(theirs, "weight_scale", torch.ones(1))
            assert torch.equal(ours.weight, (theirs.weight.float() * scale.view(-1, 1)).to(BF16)), name


def test_they_are_as_large_as_planned(path: Path) -> None:
    once = load_mllm(path, machine=ROOMY)
    found = once.loaded.patcher.model_size()
    weights = {key: value for key, value in load_mllm(path, machine=TIGHT).loaded.module.state_dict().items()}
    assert found == packed_size(weights, None, BF16, cast_once=once.plan.cast_once)


def test_tables_stay_as_they_are() -> None:
    weights = {
        "language.embed_tokens.weight": torch.zeros(4, 8),
        "language.layers.0.mlp.up_proj.weight": torch.zeros(4, 8),
    }
    assert packed_size(weights, None, BF16, cast_once=True) == 4 * 8 * (4 + 2)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 3.0, 1e-3])])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_pattern_of_fp8_is_its_value(scale: torch.Tensor | None, dtype: torch.dtype) -> None:
    """NaN too, in one row only."""
    patterns = torch.arange(256, dtype=torch.uint8)
    numbers = patterns[(patterns & 0x7F) != 0x7F]
    rows = torch.stack([numbers, numbers.flip(0), numbers.roll(7)])
    for packed in (rows, torch.where(torch.arange(3)[:, None] == 1, torch.tensor(0xFF, dtype=torch.uint8), rows)):
        weight = packed.view(torch.float8_e4m3fn)
        expected = weight.float() if scale is None else weight.float() * scale[:, None]
        cast = cast_in_blocks(weight, scale, dtype)
        assert torch.equal(cast.nan_to_num(1e9), expected.to(dtype).nan_to_num(1e9))


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_the_ram_decides_and_the_plan_says_so(precision: str) -> None:
    weights = published()
    enough, less = (replace(ROOMY, ram=gb * 10**9) for gb in (21, 20))
    once, at_each = make_plan(precision, weights, enough), make_plan(precision, weights, less)
    assert once.cast_once and once.compute_dtype == BF16 and not at_each.cast_once
    assert f"{precision}: weights in bf16, cast once from fp16, computing in bf16 on cpu" in once.summary
    assert "weights in fp16, cast at each look (20.8 GB of free RAM would do it once), computing in bf16" in (
        at_each.summary
    )
    assert make_plan(precision, weights, replace(less, holds_cast=True)) == once


def test_files_that_are_read_into_ram_need_room_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    plans = [make_plan("auto", published(), replace(ROOMY, ram=gb * 10**9)) for gb in (34, 35)]
    assert [plan.cast_once for plan in plans] == [False, True]
    assert "34.6 GB of free RAM would do it once" in plans[0].summary


@pytest.mark.parametrize("precision", ["fp8", "8-bit", "4-bit", "fp16", "fp32"])
def test_what_is_chosen_to_be_small_or_wide_stays_so(precision: str) -> None:
    plan = make_plan(precision, published(), ROOMY)
    assert not plan.cast_once and "cast" not in plan.summary


def test_a_slow_cpu_and_a_card_cast_nothing_once() -> None:
    for machine in (replace(ROOMY, bf16_gain=0.5), Machine(torch.device("cuda:0"), 10**12, 10**12, fast_dtype=BF16)):
        plan = make_plan("auto", published(), machine)
        assert not plan.cast_once and "cast" not in plan.summary


def test_another_load_shares_them_though_the_room_is_taken(tmp_path: Path) -> None:
    """By them: the RAM that is free has become less by what is shared."""
    folder = llava_folder(tmp_path / "llava")
    first = load_mllm(folder, machine=ROOMY)
    assert not load_mllm(folder, machine=TIGHT).plan.cast_once
    shared = first.loaded
    assert load_mllm(folder, machine=TIGHT).loaded is shared


def published() -> dict[str, torch.Tensor]:
    """The weights of the released checkpoint, without content."""
    language = LanguageShape(4096, 11008, 32, 32, 32, 32000, 1e-5, 10000.0)
    vision = VisionShape(1024, 4096, 23, 16, 14, 336)
    return {key: value.half() for key, value in MllmModule(language, vision).state_dict().items()}
