"""The MLLM: finding, reading, refusing, computing, being cancelled."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.mllm.checkpoint_files import find_checkpoints
from comfyui_moma.moma_modules.mllm.encode import IMAGE_TOKEN, prompt_ids, subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from sentencepiece import SentencePieceProcessor

from workbench import ROOT
from workbench.bootstrap import AT_START

DATA = ROOT / "tests" / "data" / "mllm"
CHECKPOINT = DATA / "tiny56" / "checkpoint"
SHARD, INDEX = "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "llava"))


def load(path: Path, precision: str = "fp32") -> Any:
    return load_mllm(path, precision, vision_heads=4)


def hidden(mllm: Any, word: str = "car", prompt: str = "A car.") -> torch.Tensor:
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    mask = np.zeros((512, 512), bool)
    mask[100:400, 100:400] = True
    with torch.inference_mode():
        return subject_hidden_state(mllm, image, mask, word, prompt)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in config.items() if value != "remove"}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")

    return edit


def edit_shard(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Change the weights of the first shard, and the index with them."""

    def edit(folder: Path) -> None:
        weights = torch.load(folder / SHARD, weights_only=True)
        before = set(weights)
        change(weights)
        torch.save(weights, folder / SHARD)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        for key in before - set(weights):
            del index["weight_map"][key]
        index["weight_map"] |= dict.fromkeys(weights, SHARD)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return edit


def truncate(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN = {
    "no config": (remove("config.json"), r"is incomplete: config\.json is missing\. Found: .*tokenizer\.model"),
    "config lacks an entry": (edit_config(hidden_size="remove"), r"config\.json lacks the entry 'hidden_size'"),
    "other projector": (edit_config(mm_projector_type="linear"), r"mm_projector_type is 'linear', expected 'mlp2x"),
    "other select layer": (edit_config(mm_vision_select_layer=1), r"mm_vision_select_layer is 1"),
    "no tokenizer": (remove("tokenizer.model"), r"is incomplete: tokenizer\.model is missing"),
    "bad tokenizer": (truncate("tokenizer.model"), r"tokenizer\.model is not a readable sentencepiece model"),
    "no index": (remove(INDEX), r"is incomplete: pytorch_model\.bin\.index\.json is missing"),
    "no shard": (remove(SHARD), r"is incomplete: pytorch_model-00001-of-00002\.bin is missing\. Found: "),
    "truncated shard": (truncate(SHARD), r"00001-of-00002\.bin \(1000 bytes\) is not a readable.*truncated"),
    "missing weight": (
        edit_shard(lambda w: w.pop("model.layers.0.mlp.up_proj.weight")),
        r"is incomplete: weight 'language\.layers\.0\.mlp\.up_proj\.weight' is missing",
    ),
    "unknown weight": (
        edit_shard(lambda w: w.update({"model.layers.0.lora.weight": torch.zeros(1)})),
        r"'language\.layers\.0\.lora\.weight' has no place",
    ),
    "foreign weight": (
        edit_shard(lambda w: w.update({"transformer.weight": torch.zeros(1)})),
        r"is not a LLaVA-1\.5 checkpoint: weight 'transformer\.weight' is not known",
    ),
    "wrong shape": (
        edit_shard(lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)})),
        r"up_proj\.weight' is torch\.float32 \(3, 3\), expected .*\(176, 64\)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_by_name(folder: Path, kind: str) -> None:
    break_it, message = BROKEN[kind]
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_unreadable_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON \(truncated download\?\)"):
        load(folder)


def test_code_in_a_shard_is_not_run(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "harm"

    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (target,))

    torch.save({"weight": Harm()}, folder / SHARD)
    with pytest.raises(ValueError, match=r"was refused: .*holds code instead of weights"):
        load(folder)
    assert not target.exists()


def test_what_only_a_look_needs_is_not_imported_at_start() -> None:
    hidden(load(CHECKPOINT))
    needed = {f"transformers.models.{name}.modeling_{name}" for name in ("llama", "clip")}
    assert needed <= set(sys.modules) and "comfyui_moma.nodes" in AT_START
    assert not AT_START & {*needed, "bitsandbytes"}


def test_old_style_shards_load_alike(folder: Path) -> None:
    weights = torch.load(folder / SHARD, weights_only=True)
    torch.save(weights, folder / SHARD, _use_new_zipfile_serialization=False)
    assert torch.equal(hidden(load(folder)), hidden(load(CHECKPOINT)))


def test_matrices_keep_the_dtype_of_the_file() -> None:
    module = load(CHECKPOINT, "fp32").loaded.module
    assert module.language.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert module.language.embed_tokens.weight.dtype == torch.float16
    assert module.language.norm.weight.dtype == torch.float32


def test_cancelling_stops_at_a_layer_and_leaves_nothing() -> None:
    expected = hidden(load(CHECKPOINT))
    mllm = load(CHECKPOINT)
    passed: list[int] = []
    module = mllm.loaded.module
    stop = module.layers()[2].register_forward_hook(
        lambda *_: (passed.append(2), comfy.model_management.interrupt_current_processing(True))[1]
    )
    late = module.layers()[-1].register_forward_hook(lambda *_: passed.append(-1))
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            _with_server_progress(lambda: hidden(mllm))
    finally:
        stop.remove()
        late.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert passed == [2]
    assert all(not layer._forward_hooks for layer in module.layers())
    assert torch.equal(hidden(mllm), expected)


def _with_server_progress(call: Callable[[], Any]) -> Any:
    """Within a server, progress bars check for Cancel; here the same check is hooked in and taken out again."""
    import comfy.utils

    def hook(*_: Any, **__: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    kept = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        return call()
    finally:
        comfy.utils.set_progress_bar_global_hook(kept)


def test_the_recorded_prompts_tokenise_alike() -> None:
    recorded = json.loads((DATA / "tokens_tiny.json").read_text(encoding="utf-8"))
    tokenizer = SentencePieceProcessor(model_proto=(CHECKPOINT / "tokenizer.model").read_bytes())
    by_design = {*recorded["special_token_literals_idx"], *recorded["image_literal_idx"]}
    for i, text in enumerate(recorded["prompts"]):
        ids = prompt_ids(tokenizer, text, text)
        assert ids.count(IMAGE_TOKEN) == 1
        if i not in by_design:
            assert ids == recorded["image_prompt"][i], text


def test_folders_are_found_by_relative_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    places = {
        "MoMA_llava_7b": one / "MoMA_llava_7b",
        "hub/snapshots/abc": one / "hub" / "snapshots" / "abc",
        "second": two / "second",
    }
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(CHECKPOINT)
    (two / "MoMA_llava_7b").symlink_to(CHECKPOINT)
    for path in (one / "a" / "b" / "c" / "d" / "too_deep", one / "other"):
        path.mkdir(parents=True)
        (path / "config.json").write_text('{"model_type": "bert"}' if path.name == "other" else "{}", encoding="utf-8")
    (one / "loop").symlink_to(one)
    found = find_checkpoints([one, two])
    assert {name: found[name] for name in places} == places
    assert "other" not in found and all("too_deep" not in name for name in found)
    assert find_checkpoints([CHECKPOINT]) == {"checkpoint": CHECKPOINT}
