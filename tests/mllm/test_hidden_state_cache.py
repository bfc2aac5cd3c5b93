"""What the MLLM said is kept on disk, and neither it nor its weights are asked for again."""

import os
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.host.folders import user_folder
from comfyui_moma.moma_modules.mllm import hidden_state_cache
from comfyui_moma.moma_modules.mllm.hidden_state_cache import HIDDEN_STATES, HiddenStateCache
from comfyui_moma.moma_modules.mllm.loading import Mllm, load_mllm
from comfyui_moma.nodes import ExtractSubject
from comfyui_moma.nodes.loaders import load_adapter

from workbench.random_weights import HIDDEN, SMALL_LLAVA, adapter_file, llava_folder

IMAGE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
MASK = np.ones((32, 32), bool)
ARGUMENTS: dict[str, Any] = {"image": IMAGE, "mask": MASK}
TEXT = {"subject": "car", "prompt": "A red car."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture
def cache(tmp_path: Path) -> HiddenStateCache:
    return HiddenStateCache(tmp_path / "cache")


def ask(cache: HiddenStateCache, mllm: Mllm, **changes: Any) -> tuple[torch.Tensor, bool]:
    """The hidden state, and whether the weights were read for it by this handle."""
    text = {name: changes.pop(name, value) for name, value in TEXT.items()}
    with torch.inference_mode():
        (hidden,) = cache.hidden_states(mllm, **(ARGUMENTS | changes), texts=[(text["subject"], text["prompt"])])
    return hidden, "loaded" in vars(mllm)


def test_the_second_time_nothing_is_loaded(cache: HiddenStateCache, folder: Path) -> None:
    first, loaded = ask(cache, load_mllm(folder))
    assert loaded
    again, loaded = ask(cache, load_mllm(folder))
    assert torch.equal(first, again) and not loaded
    (file,) = cache.folder.iterdir()
    assert file.suffix == ".safetensors" and file.stat().st_size < 4 * HIDDEN + 500


@pytest.mark.parametrize(
    "changes",
    [{"image": IMAGE ^ 1}, {"mask": ~MASK}, {"subject": "cat"}, {"prompt": "A red car"}],
    ids=["image", "mask", "subject", "prompt"],
)
def test_other_inputs_are_computed(cache: HiddenStateCache, folder: Path, changes: dict[str, Any]) -> None:
    first, _ = ask(cache, load_mllm(folder))
    other, loaded = ask(cache, load_mllm(folder), **changes)
    assert loaded and not torch.equal(first, other)


def test_another_model_or_precision_is_computed(cache: HiddenStateCache, folder: Path, tmp_path: Path) -> None:
    ask(cache, load_mllm(folder, "fp32"))
    assert ask(cache, load_mllm(folder, "fp8"))[1]
    assert not ask(cache, load_mllm(folder, "fp32"))[1]
    assert ask(cache, load_mllm(llava_folder(tmp_path / "other", SMALL_LLAVA.with_layers(3)), "fp32"))[1]


def test_results_of_another_format_are_not_used(
    cache: HiddenStateCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format 1 held what bf16 and fp16 gave while part of the forward ran in fp32."""
    with monkeypatch.context() as earlier:
        earlier.setattr(hidden_state_cache, "_FORMAT", "moma hidden state 1")
        earlier.setattr(hidden_state_cache, "subject_hidden_states", lambda *_: [torch.full((1, HIDDEN), 7.0)])
        kept, _ = ask(cache, load_mllm(folder, "bf16"))
    assert kept.eq(7).all() and len(list(cache.folder.iterdir())) == 1
    ours, loaded = ask(cache, load_mllm(folder, "bf16"))
    assert loaded and not ours.eq(7).any()
    assert len(list(cache.folder.iterdir())) == 2
    assert torch.equal(ask(cache, load_mllm(folder, "bf16"))[0], ours)


@pytest.mark.parametrize("damage", [b"", b"noise", None])
def test_a_damaged_file_is_replaced(cache: HiddenStateCache, folder: Path, damage: bytes | None) -> None:
    expected, _ = ask(cache, load_mllm(folder))
    (file,) = cache.folder.iterdir()
    sound = file.read_bytes()
    nan = np.float32("nan").tobytes()
    file.write_bytes(sound[:-4] + nan if damage is None else damage)
    again, loaded = ask(cache, load_mllm(folder))
    assert loaded and torch.equal(again, expected)
    assert file.read_bytes() == sound and list(cache.folder.iterdir()) == [file]


def test_the_longest_unused_go_first(cache: HiddenStateCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_state_cache, "LIMIT", 3)
    mllm = load_mllm(folder)
    for i, prompt in enumerate("abc"):
        ask(cache, mllm, prompt=prompt)
        for file in cache.folder.iterdir():
            if file.stat().st_mtime > 100:
                os.utime(file, (i, i))
    ask(cache, load_mllm(folder), prompt="a")  # used now, so that b is the oldest
    ask(cache, mllm, prompt="d")
    assert len(list(cache.folder.iterdir())) == 3
    del mllm
    assert [ask(cache, load_mllm(folder), prompt=prompt)[1] for prompt in "acdb"] == [False, False, False, True]


def test_an_unwritable_folder_is_a_warning(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    hidden, _ = ask(HiddenStateCache(tmp_path / "file"), load_mllm(folder))
    assert hidden.isfinite().all()
    assert "could not keep a hidden state in" in caplog.text


def test_a_file_that_another_server_takes_away_is_no_warning(
    cache: HiddenStateCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.folder.mkdir()
    (cache.folder / "of_another.part").symlink_to(cache.folder / "gone")  # listed, and not there when looked at
    ask(cache, load_mllm(folder))
    assert len(list(cache.folder.glob("*.safetensors"))) == 1 and not caplog.text


def test_of_several_texts_only_new_ones_are_computed(cache: HiddenStateCache, folder: Path) -> None:
    texts = [("car", "A red car."), ("car", "A blue car."), ("car", "A red car.")]
    mllm = load_mllm(folder)
    ask(cache, mllm)
    computed: list[int] = []
    mllm.loaded.module.language.layers[0].register_forward_hook(lambda *_: computed.append(1))
    with torch.inference_mode():
        first, second, third = cache.hidden_states(mllm, IMAGE, MASK, texts)
        again = HiddenStateCache(cache.folder).hidden_states(load_mllm(folder), IMAGE, MASK, texts)
    assert len(computed) == 1 and len(list(cache.folder.iterdir())) == 2
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(torch.stack(again), torch.stack([first, second, third]))


def test_nan_is_not_kept(cache: HiddenStateCache, folder: Path) -> None:
    mllm = load_mllm(folder)
    with torch.inference_mode():
        mllm.loaded.module.language.norm.weight.fill_(float("nan"))
    assert ask(cache, mllm)[0].isnan().all()
    assert not cache.folder.exists()


def test_the_node_keeps_results_in_the_user_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    adapter = load_adapter(adapter_file(tmp_path / "adapter"))
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))

    def extract(cache: bool) -> tuple[torch.Tensor, bool]:
        mllm = load_mllm(folder)
        with torch.inference_mode():
            output = ExtractSubject.execute(mllm, adapter, image, "car", "A car.", "squash", cache)
        return output.args[0].embedding, "loaded" in vars(mllm)

    first, loaded = extract(cache=False)
    assert loaded and not user_folder(HIDDEN_STATES).exists()
    for expected in (True, False):
        embedding, loaded = extract(cache=True)
        assert torch.equal(embedding, first) and loaded == expected
    assert user_folder(HIDDEN_STATES) == tmp_path / "user" / "__moma" / "hidden_states"
    assert len(list(user_folder(HIDDEN_STATES).iterdir())) == 1
    assert extract(cache=False)[1]
