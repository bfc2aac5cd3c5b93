"""Training an adapter on a user's folder: the data, what is wrong with it, and the whole command."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.training import adapter as command
from comfyui_moma.training import data, export, folder_stage, language, loop, machine
from comfyui_moma.training.adapter_weights import first_weights
from comfyui_moma.training.folder_data import read_entries
from comfyui_moma.training.loop import Plan
from comfyui_moma.training.machine import find_machine
from comfyui_moma.training.painter import paint
from comfyui_moma.training.prepared import Prepared, items_of
from PIL import Image
from random_stages import RandomStages
from safetensors.torch import save_file

from workbench import ROOT
from workbench.small_world import CHECKPOINT, MLLM
from workbench.tiny_models import tiny_model

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
HIDDEN = language.language_shape().hidden_size
LINE = {"file_name": "1.png", "mask": "1_mask.png", "word": "cup", "prompt": "A cup on the moon."}


def _folder(path: Path, lines: list[Any]) -> Path:
    """Four painted pictures with masks and these lines."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        picture, mask = paint(data.scene_of(number))
        Image.fromarray(picture).save(path / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(path / f"{number}_mask.png")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_a_line_is_a_picture_a_mask_a_word_and_a_prompt_and_may_have_a_reference(tmp_path: Path) -> None:
    paired = {**LINE, "reference": "0.png", "reference_mask": "0_mask.png", "strength": 0.4}
    captioned = {"file_name": "3.png", "mask": "3_mask.png", "word": "hat", "caption": "A hat.", "other": 1}
    first, second = read_entries(_folder(tmp_path, [paired, "", captioned]))
    picture, mask = first.target(128)
    assert np.array_equal(picture, paint(data.scene_of(1))[0]) and np.array_equal(mask, paint(data.scene_of(1))[1])
    assert np.array_equal(first.shown(128, 0)[0], paint(data.scene_of(0))[0])
    assert (first.strength, second.strength, second.prompt, second.line) == (0.4, 1.0, "A hat.", 3)
    items = items_of([first, second], 3, 128)
    assert [(item.entry.line, item.variant) for item in items] == [(1, 0), (3, 0), (3, 1), (3, 2)]


def test_a_picture_that_is_its_own_reference_is_moved_with_its_mask(tmp_path: Path) -> None:
    (entry,) = read_entries(_folder(tmp_path, [LINE]))
    picture, mask = entry.target(128)
    moved = [entry.shown(128, variant) for variant in range(8)]
    for other, other_mask in moved:
        assert other.shape == picture.shape and not np.array_equal(other, picture)
        colours = [shown[inside].mean(axis=0) for shown, inside in ((picture, mask), (other, other_mask))]
        assert np.abs(colours[0] - colours[1]).max() < 12  # The mask still lies on the subject.
    assert len({int(other_mask.sum()) for _, other_mask in moved}) == 8
    assert np.array_equal(entry.shown(128, 5)[0], moved[5][0])


def test_some_variants_are_mirrored_and_some_are_not(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [LINE])
    halves, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    halves[:, :32, 0] = halves[:, 32:, 2] = mask[16:48, 16:48] = 255
    Image.fromarray(halves).save(folder / "1.png")
    Image.fromarray(mask).save(folder / "1_mask.png")
    (entry,) = read_entries(folder)
    red_is_left = []
    for variant in range(12):
        picture, inside = entry.shown(64, variant)
        red, blue = (float(np.nonzero(inside & (picture[..., i] > 200))[1].mean()) for i in (0, 2))
        red_is_left.append(red < blue)
    assert set(red_is_left) == {True, False}


def test_the_largest_square_around_the_subject_is_used(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [LINE])
    wide, mask = np.zeros((64, 200, 3), np.uint8), np.zeros((64, 200), np.uint8)
    wide[:, 150:170], mask[:, 150:170] = 255, 255
    Image.fromarray(wide).save(folder / "1.png")
    Image.fromarray(mask).save(folder / "1_mask.png")
    picture, inside = read_entries(folder)[0].target(64)
    assert inside.mean() == pytest.approx(20 / 64, abs=0.02)
    assert (picture[inside] > 200).mean() > 0.9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: holds a list, expected an object"),
        ({**LINE, "file_name": "9.png"}, "line 2: file_name is '9.png', which is not in the folder"),
        ({**LINE, "mask": None}, "line 2: mask is None, expected the name of a file"),
        ({**LINE, "word": " "}, "line 2: word is ' ', expected text"),
        ({**LINE, "prompt": 3}, "line 2: prompt is 3, expected text"),
        ({k: v for k, v in LINE.items() if k != "prompt"}, r"line 2: prompt \(or caption\) is None"),
        ({**LINE, "reference": "0.png"}, "line 2: reference and reference_mask belong together"),
        ({**LINE, "strength": 2}, "line 2: strength is 2, expected a number from 0 to 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"metadata.jsonl:\n{message}"):
        read_entries(_folder(tmp_path, [LINE, line]))


def test_all_wrong_lines_are_named_and_a_folder_without_any_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: .*\nline 2: .*\nline 3: .*\nline 4: .*\nline 5: .*\nand 2 more"):
        read_entries(_folder(tmp_path, ["{"] * 7))
    with pytest.raises(ValueError, match="metadata.jsonl has no lines"):
        read_entries(_folder(tmp_path, []))
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_entries(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="metadata.jsonl is missing: training data is a folder with pictures"):
        read_entries(tmp_path)


def test_a_broken_picture_and_an_empty_mask_are_named_with_their_line(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [LINE])
    (entry,) = read_entries(folder)
    Image.new("L", (9, 9)).save(folder / "1_mask.png")
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: the mask 1_mask.png is empty. It must be white"):
        entry.target(128)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: 1.png is not a readable picture"):
        entry.target(128)


def test_what_is_prepared_is_kept_until_what_it_was_made_of_changes(tmp_path: Path) -> None:
    folder, computed = _folder(tmp_path / "data", [LINE]), []

    def compute(item: Any) -> dict[str, torch.Tensor]:
        computed.append(item.variant)
        return {"hidden": torch.ones(2)}

    def prepared(of: str = "a") -> Prepared:
        found = Prepared(tmp_path / "kept", items_of(read_entries(folder), 2, 64), of)
        found.compute("test", compute)
        return found

    assert prepared().complete and torch.equal(prepared().load(1)["hidden"], torch.ones(2))
    assert computed == [0, 1]
    prepared("another model")
    assert len(computed) == 4
    os.utime(folder / "1.png", (1, 1))
    prepared()
    assert len(computed) == 6
    broken = Prepared(tmp_path / "kept", items_of(read_entries(folder), 1, 64), "nan")
    with pytest.raises(ValueError, match="line 1: the hidden came out as NaN or infinite"):
        broken.compute("test", lambda _: {"hidden": torch.tensor([torch.nan])})


def _aligned(tmp_path: Path, samples: int) -> tuple[Any, Any]:
    """The mapping after so many samples, towards embeddings that depend on the hidden states."""
    lines = [{**LINE, "word": word} for word in ("cup", "car", "hat")]
    items = items_of(read_entries(_folder(tmp_path / "data", lines)), 1, 64)
    hidden, encoded = (Prepared(tmp_path / name, items, name) for name in ("hidden", "encoded"))
    states = iter(torch.eye(3, 8))
    targets = iter(torch.eye(3, 6))
    hidden.compute("test", lambda _: {"hidden": next(states)})
    encoded.compute("test", lambda _: {"embedding": next(targets)})
    torch.manual_seed(0)
    start = first_weights(tiny_model().model.diffusion_model, 6, 8)
    plan = Plan(samples, 4, 0.02, warm_up=1, ema=0.5)
    where = machine.Machine(CPU, torch.float32, None)
    return start, folder_stage.align(start, hidden, encoded, tmp_path / "alignment", where, plan)


def test_alignment_teaches_the_mapping_the_embeddings_of_the_targets_and_nothing_else(tmp_path: Path) -> None:
    start, aligned = _aligned(tmp_path, 800)
    changed = {key for key, value in aligned.tensors.items() if not torch.equal(value, start.tensors[key])}
    assert changed == {f"mapping.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    mapping = folder_stage.Mapping(8, 6, None, torch.float32, torch.nn)
    mapping.load_state_dict({key.removeprefix("mapping."): aligned.tensors[key] for key in changed})
    assert float((mapping(torch.eye(3, 8)) - torch.eye(3, 6)).detach().square().mean()) < 0.02


def test_start_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    from workbench.tiny_models import adapter_groups

    file = tmp_path / "attn_adapters_projectors.th"
    torch.save(adapter_groups(embedding=48, hidden=64), file)
    unet = tiny_model().model.diffusion_model
    assert folder_stage.start_weights(unet, 64, None, file).sizes.embedding == 48
    with pytest.raises(ValueError, match=r"--start .*th: mapping.gate_proj.weight has shape \(48, 64\); the models"):
        folder_stage.start_weights(unet, 65, None, file)
    assert folder_stage.start_weights(unet, 65, None, None).sizes.embedding == 1024


def test_another_model_than_sd15_is_refused_by_name() -> None:
    clip = object()
    folder_stage.check_parts(folder_stage.Parts("a.safetensors", tiny_model(), clip, clip))
    other = tiny_model(transformer_depth=[0, 0, 1, 1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="--checkpoint b.safetensors is SD15; an adapter is trained on a whole SD1.5"):
        folder_stage.check_parts(folder_stage.Parts("b.safetensors", other, clip, clip))
    with pytest.raises(ValueError, match=r"a whole SD1.5 checkpoint \(UNet, CLIP and VAE\)"):
        folder_stage.check_parts(folder_stage.Parts("c.safetensors", tiny_model(), None, clip))


def test_precisions_that_need_accelerate_say_so_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert find_machine(None, CPU).dtype == torch.float32
    assert "accelerate is not installed: going on with torch alone, on cpu in fp32" in capsys.readouterr().out
    with find_machine("bf16", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="fp16 needs accelerate, .* is not installed. Install it beside ComfyUI"):
        find_machine("fp16", CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Several processes were started, but the adapter trains on one device"):
        find_machine(None, CPU)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint and language model with random weights, and data."""
    folder, stages = tmp_path_factory.mktemp("files"), RandomStages()
    export.export_checkpoint(folder / CHECKPOINT, stages.vae, stages.base, 2.7)
    export.export_mllm(folder / MLLM, stages.reader)
    paired = {**LINE, "file_name": "3.png", "mask": "3_mask.png", "reference": "2.png", "reference_mask": "2_mask.png"}
    _folder(folder / "data", [LINE, paired])
    return folder


def _options(files: Path, out: Path, **changes: Any) -> argparse.Namespace:
    words = ["--checkpoint", CHECKPOINT, "--mllm", MLLM, "--data", "data"]
    named = [word if word.startswith("--") else str(files / word) for word in words]
    return argparse.Namespace(**{**vars(command.parse_arguments(_words(named, out))), **changes})


def _words(named: list[str], out: Path) -> list[str]:
    few = ["--steps", "3", "--batch", "2", "--size", "128", "--shown", "1", "--threads", "1"]
    return [*named, "--out", str(out), *few]


def _result(path: Path) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in load_adapter(path).module.state_dict().items()}


def test_a_run_on_a_folder_that_was_killed_goes_on_as_if_it_had_not_been(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr(folder_stage, "answered", lambda *_: [(torch.zeros(3, 128, 128),) * 2])
    whole = _result(command.train(_options(files, tmp_path / "whole")))
    assert "No --clip-vision: the mapping is not aligned first" in capsys.readouterr().out
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)  # After each step.
    real, calls = folder_stage.loss_of, []

    def killing(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(folder_stage, "loss_of", killing)
    with pytest.raises(KeyboardInterrupt):
        command.train(_options(files, tmp_path / "killed"))
    monkeypatch.setattr(folder_stage, "loss_of", real)
    resumed = _result(command.train(_options(files, tmp_path / "killed")))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    with pytest.raises(ValueError, match="--out .* holds a run with another --rate. Go on with that, or name another"):
        command.train(_options(files, tmp_path / "killed", rate=1.0))


def test_files_that_are_no_good_are_named_by_their_option(files: Path, tmp_path: Path) -> None:
    options = _options(files, tmp_path / "out")
    options.mllm = tmp_path / "nothing"
    with pytest.raises(ValueError, match="--mllm .*nothing is not there"):
        command.train(options)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"--checkpoint .*other.safetensors is not a checkpoint that ComfyUI loads"):
        command.train(_options(files, tmp_path / "one", checkpoint=other))
    with pytest.raises(
        ValueError, match=r"--clip-vision .*other.safetensors is not an image encoder that ComfyUI loads"
    ):
        command.train(_options(files, tmp_path / "two", clip_vision=other))


def test_accelerate_computes_what_torch_alone_does(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(folder_stage, "answered", lambda *_: [(torch.zeros(3, 128, 128),) * 2])
    assert find_machine(None, CPU).accelerator is not None
    accelerated = _result(command.train(_options(files, tmp_path / "accelerated")))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    alone = _result(command.train(_options(files, tmp_path / "alone")))
    assert all(torch.equal(value, accelerated[key]) for key, value in alone.items())


@pytest.mark.slow
def test_the_command_trains_an_adapter_that_the_product_loads(files: Path, tmp_path: Path) -> None:
    named = [str(files / word) for word in (CHECKPOINT, MLLM, "data")]
    words = [part for pair in zip(("--checkpoint", "--mllm", "--data"), named, strict=True) for part in pair]
    script = ROOT / "training" / "adapter.py"
    inside = {**os.environ, "COMFYUI_MOMA_INSIDE": os.environ.get("COMFYUI_PATH", str(ROOT.parent.parent))}
    run = subprocess.run(
        [sys.executable, script, *_words(words, tmp_path / "out")],
        env=inside,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    path = tmp_path / "out" / "attn_adapters_projectors.safetensors"
    assert f"The adapter is {path}." in run.stdout
    adapter = load_adapter(path)
    assert (adapter.sizes.embedding, adapter.sizes.hidden, adapter.sizes.layers[0]) == (1024, HIDDEN, 96)
    assert load_adapter(path.with_suffix(".th")).identity == adapter.identity
    assert Image.open(tmp_path / "out" / "adapter" / "samples.png").size == (128, 4 * 128)
    assert (tmp_path / "out" / "adapter" / "loss.csv").read_text("utf-8").startswith("6,")
