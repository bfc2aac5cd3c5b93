"""An MLLM as one file: what it holds, computes, survives, refuses; and what happens when the writing is broken off."""

import gc
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.adapter.loading import adapter_names
from comfyui_moma.moma_modules.host.folders import MODELS
from comfyui_moma.moma_modules.mllm.checkpoint import Reader, read_checkpoint, read_mapped
from comfyui_moma.moma_modules.mllm.checkpoint_files import find_checkpoints
from comfyui_moma.moma_modules.mllm.convert import PRECISIONS, convert_mllm
from comfyui_moma.moma_modules.mllm.loading import load_mllm, mllm_choices, read_as_comfyui
from comfyui_moma.moma_modules.mllm.precision import Machine
from comfyui_moma.nodes.convert import ConvertMllm
from comfyui_moma.nodes.loaders import LoadMllm
from safetensors import safe_open
from safetensors.torch import save_file

from workbench import ROOT
from workbench.random_weights import llava_folder

CHECKPOINT = ROOT / "tests" / "data" / "mllm" / "tiny56" / "checkpoint"
COMMAND = [sys.executable, "-m", "moma_modules.convert_mllm"]


def ignore(done: int, total: int, text: str) -> None:
    """A report that nobody looks at."""


def stop_after(share: float) -> Callable[[int, int, str], None]:
    """A report that cancels once that share is done."""

    def report(done: int, total: int, text: str) -> None:
        if done > share * total:
            raise comfy.model_management.InterruptProcessingException

    return report


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    read = read_checkpoint(path, vision_heads=4)
    parts = {"language": read.language, "vision": read.vision, "projector": read.projector}
    return {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_holds_the_same_model(target: Path, precision: str) -> None:
    before = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    convert_mllm(CHECKPOINT, target, precision, ignore)
    assert {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()} == before and names(target.parent) == {
        target.name
    }
    old, new = read_checkpoint(CHECKPOINT, 4), read_checkpoint(target, 4)
    assert (new.config, new.language_shape, new.vision_shape) == (old.config, old.language_shape, old.vision_shape)
    assert new.tokenizer.serialized_model_proto() == old.tokenizer.serialized_model_proto()
    written = weights(target)
    for key, value in weights(CHECKPOINT).items():
        found = written.pop(key).float()
        if key + "_scale" in written:
            assert precision in ("fp8", "int8") and key.startswith("language.layers.")
            found *= written.pop(key + "_scale")[:, None]
            step = value.float().abs().amax(dim=1, keepdim=True) / (127 if precision == "int8" else 14)
            assert bool(((found - value.float()).abs() <= 0.51 * step).all())
        else:
            dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
            assert torch.equal(found, value.to(dtypes.get(precision, value.dtype)).float())
    assert not written


def test_the_file_leaves_out_what_is_not_used(target: Path) -> None:
    convert_mllm(CHECKPOINT, target, "keep", ignore)
    with safe_open(target, framework="pt") as file:
        keys = file.keys()
        assert "tokenizer" in keys and not any("lm_head" in key or "post_layernorm" in key for key in keys)
    layers = read_checkpoint(target, 4).vision_shape.layers
    assert {key.split(".")[3] for key in keys if key.startswith("vision.encoder.layers.")} == set(
        map(str, range(layers))
    )
    shard = torch.load(CHECKPOINT / "pytorch_model-00002-of-00002.bin") | torch.load(
        CHECKPOINT / "pytorch_model-00001-of-00002.bin"
    )
    assert any(f"encoder.layers.{layers}." in key for key in shard)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.8])
def test_cancelled_work_goes_on_and_gives_the_same_bytes(target: Path, tmp_path: Path, share: float) -> None:
    whole = tmp_path / "whole" / "small.safetensors"
    whole.parent.mkdir()
    convert_mllm(CHECKPOINT, whole, "int8", ignore)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        convert_mllm(CHECKPOINT, target, "int8", stop_after(share))
    assert not target.exists()
    first: list[int] = []
    convert_mllm(CHECKPOINT, target, "int8", lambda done, total, text: first.append(done))
    assert target.read_bytes() == whole.read_bytes() and names(tmp_path) == {target.name, "whole"}
    assert first[0] > 0.8 * min(share, 0.5) * 2 * target.stat().st_size - 1000


def test_a_killed_process_leaves_work_to_go_on_with(tmp_path: Path, target: Path) -> None:
    source = llava_folder(tmp_path / "llava")
    code = (
        "import sys, time; from pathlib import Path; from moma_modules.mllm.convert import convert_mllm\n"
        "def report(done, total, text):\n"
        "    if done > total // 4: print('there', flush=True); time.sleep(10**6)\n"
        f"convert_mllm(Path({str(source)!r}), Path({str(target)!r}), 'keep', report)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists() and target.with_name("small.safetensors.part").exists()
    first: list[int] = []
    convert_mllm(source, target, "keep", lambda done, total, text: first.append(done))
    assert first[0] > target.stat().st_size // 4 and find_checkpoints([tmp_path])[target.name] == target
    assert names(tmp_path) == {"llava", target.name}


def test_work_that_went_bad_is_found_and_done_anew(target: Path) -> None:
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        convert_mllm(CHECKPOINT, target, "keep", stop_after(0.4))
    part = target.with_name(target.name + ".part")
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 2)
        file.write(b"garbage" * 9)
    with pytest.raises(ValueError, match=r"small\.safetensors\.part did not read back as written and was removed"):
        convert_mllm(CHECKPOINT, target, "keep", ignore)
    assert not part.exists() and not target.exists()
    convert_mllm(CHECKPOINT, target, "keep", ignore)
    assert len(weights(target)) == len(weights(CHECKPOINT))


def test_another_source_starts_over(target: Path, tmp_path: Path) -> None:
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        convert_mllm(CHECKPOINT, target, "keep", stop_after(0.4))
    other = llava_folder(tmp_path / "llava")
    convert_mllm(other, target, "keep", ignore)
    assert weights(target).keys() == weights(other).keys()


def test_two_at_once_end_with_one_good_file(tmp_path: Path, target: Path) -> None:
    source = llava_folder(tmp_path / "llava")
    command = [*COMMAND, str(source), str(target), "--precision", "fp8"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    outputs = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all(f"{target}: 1 MB" in output or f"{target}: 2 MB" in output for output in outputs)
    assert names(tmp_path) == {"llava", target.name} and len(weights(target)) > 80


def test_a_second_conversion_waits_and_can_be_cancelled(target: Path) -> None:
    held, go = threading.Event(), threading.Event()

    def hold(done: int, total: int, text: str) -> None:
        held.set()
        go.wait()

    first = threading.Thread(target=convert_mllm, args=(CHECKPOINT, target, "keep", hold))
    first.start()
    held.wait()
    texts: list[str] = []

    def cancel(done: int, total: int, text: str) -> None:
        texts.append(text)
        raise comfy.model_management.InterruptProcessingException

    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            convert_mllm(CHECKPOINT, target, "keep", cancel)
    finally:
        go.set()
        first.join()
    assert texts == ["Another process writes this file; waiting for it"]
    assert len(weights(target)) > 80


def test_a_finished_file_is_kept_and_another_one_is_not_overwritten(target: Path) -> None:
    convert_mllm(CHECKPOINT, target, "keep", ignore)
    stat = target.stat()
    convert_mllm(CHECKPOINT, target, "keep", ignore)
    assert target.stat().st_ino == stat.st_ino and target.stat().st_mtime_ns == stat.st_mtime_ns
    with pytest.raises(ValueError, match=r"small\.safetensors is there already and is not this conversion: remove it"):
        convert_mllm(CHECKPOINT, target, "int8", ignore)
    with pytest.raises(ValueError, match=r"no_such is not there|is incomplete|not there"):
        convert_mllm(CHECKPOINT, target.parent / "no_such" / "x.safetensors", "keep", ignore)


def test_what_cannot_be_converted_is_refused(target: Path, tmp_path: Path) -> None:
    convert_mllm(CHECKPOINT, target, "int8", ignore)
    again = tmp_path / "again.safetensors"
    with pytest.raises(ValueError, match=r"small\.safetensors is in 8 bit already: convert the checkpoint"):
        convert_mllm(target, again, "keep", ignore)
    with pytest.raises(ValueError, match=r"^The target must end in \.safetensors, got x\.bin"):
        convert_mllm(CHECKPOINT, tmp_path / "x.bin", "keep", ignore)
    with pytest.raises(ValueError, match="^precision is 'nf4', expected one of keep, bf16, fp16, fp8, int8"):
        convert_mllm(CHECKPOINT, again, "nf4", ignore)
    source = llava_folder(tmp_path / "llava")
    shard = source / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(shard)
    key = "model.layers.0.mlp.up_proj.weight"
    torch.save({**tensors, key: torch.full(tensors[key].shape, 1e6, dtype=torch.float32)}, shard)
    with pytest.raises(
        ValueError, match=r"'language\.layers\.0\.mlp\.up_proj\.weight' holds values .* too large for fp16"
    ):
        convert_mllm(source, again, "fp16", ignore)


def test_a_full_disk_is_told_before_and_while_writing(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 700_000)
    with pytest.raises(OSError, match=r"x\.safetensors needs 1 MB more on the disk of .*, but 0 MB are free\. Make"):
        convert_mllm(CHECKPOINT, small_disk / "x.safetensors", "keep", ignore)
    filler.unlink()

    def fill(done: int, total: int, text: str) -> None:
        filler.write_bytes(b"0" * 700_000)

    with pytest.raises(OSError, match=r"x\.safetensors\.part could not be written \(No space left on device\)\. Conv"):
        convert_mllm(CHECKPOINT, small_disk / "x.safetensors", "keep", fill)
    filler.unlink()
    convert_mllm(CHECKPOINT, small_disk / "x.safetensors", "keep", ignore)
    assert names(small_disk) == {"x.safetensors"}


def test_a_file_that_cannot_grow_is_told_and_gone_on_with(target: Path) -> None:
    """A real write that fails, as any user can have one: the system's limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match=r"small\.safetensors\.part could not be written \(File too large\)\. Conv"):
            convert_mllm(CHECKPOINT, target, "keep", ignore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    first: list[int] = []
    convert_mllm(CHECKPOINT, target, "keep", lambda done, total, text: first.append(done))
    assert first[0] > 0 and names(target.parent) == {target.name}


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """In a process of its own: anonymous memory while a checkpoint of 32 times its largest tensor is made 8-bit."""
    source = llava_folder(tmp_path / "llava")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {
        "num_hidden_layers": 12,
        "intermediate_size": 20000,
    }
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = json.loads((source / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for name in set(index["weight_map"].values()):
        tensors |= torch.load(source / name)
        (source / name).unlink()
    kept = {key: value for key, value in tensors.items() if "mlp." not in key or "vision" in key}
    for i in range(12):
        kept |= {
            key.replace("layers.0.", f"layers.{i}."): v for key, v in kept.items() if key.startswith("model.layers.0.")
        }
        for name, shape in (("gate", (20000, 128)), ("up", (20000, 128)), ("down", (128, 20000))):
            kept[f"model.layers.{i}.mlp.{name}_proj.weight"] = torch.full(shape, 0.1, dtype=torch.float16)
    torch.save(kept, source / "pytorch_model.bin")
    (source / "pytorch_model.bin.index.json").unlink()
    largest, total = 20000 * 128 * 2, (source / "pytorch_model.bin").stat().st_size
    assert total > 32 * largest
    code = (
        "import threading, time; from pathlib import Path; from moma_modules.mllm.convert import convert_mllm\n"
        "def anonymous():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) * 1024\n"
        "seen = [anonymous()]\n"
        "def report(*_): seen.append(anonymous())\n"
        f"convert_mllm(Path({str(source)!r}), Path({str(tmp_path / 'x.safetensors')!r}), 'int8', report)\n"
        "print(max(seen) - seen[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert int(done.stdout) < 16 * largest


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One folder of models with a small MLLM in it."""
    root = tmp_path / "moma"
    llava_folder(root / "MoMA_llava_7b")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, MODELS, ([str(root)], {".th", ".safetensors"}))
    folder_paths.filename_list_cache.pop(MODELS, None)
    yield root


def test_the_node_writes_a_file_that_the_loader_finds(roots: Path) -> None:
    shown = ConvertMllm.execute("MoMA_llava_7b", "fp8", "").ui.as_dict()["text"][0]
    assert str(roots / "MoMA_llava_7b_fp8.safetensors") in shown and "MB" in shown
    assert LoadMllm.validate_inputs("MoMA_llava_7b_fp8.safetensors") is True
    assert not any("fp8" in name for name in adapter_names())
    ConvertMllm.execute("MoMA_llava_7b", "keep", "sub\\one")
    assert "sub/one.safetensors" in mllm_choices()
    assert read_checkpoint(roots / "sub" / "one.safetensors").name == "one.safetensors"


LEADS_OUT = ["../x", "a/../../x", "/x", "\\x", "C:\\x", "c:x", "..", "a/..", "\\\\host\\share\\x"]
NO_NAMES = ["con", "a/NUL.txt", "Com1", "lpt9.x/y", "a./y", "a /y", "a?b", "x\ny", "a|b", "x" * 300]


@pytest.mark.parametrize("name", [*LEADS_OUT, *NO_NAMES])
def test_names_that_lead_out_or_are_none_are_refused(roots: Path, name: str) -> None:
    before = sorted(str(path) for path in roots.parent.rglob("*"))
    message = str(ConvertMllm.validate_inputs("MoMA_llava_7b", name))
    assert message.startswith(f"filename {name[:80]!r} ") and message.endswith(
        "Give a name such as 'cup' or 'cars/red'."
    )
    with pytest.raises(ValueError, match="^filename '"):
        ConvertMllm.execute("MoMA_llava_7b", "keep", name)
    assert sorted(str(path) for path in roots.parent.rglob("*")) == before


def test_links_do_not_lead_out_on_writing(roots: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (roots / "sub").symlink_to(outside)
    (roots / "file.safetensors").symlink_to(outside / "file.safetensors")
    for name in ("sub/x", "sub/deep/x", "file"):
        with pytest.raises(ValueError, match=r"^filename: .* leads out of .*moma by a link; choose another name"):
            ConvertMllm.execute("MoMA_llava_7b", "keep", name)
    (roots / "y.safetensors.part").symlink_to(outside / "y")
    with pytest.raises(ValueError, match=r"y\.safetensors\.part or y\.safetensors\.journal is a link: remove it"):
        ConvertMllm.execute("MoMA_llava_7b", "keep", "y")
    assert names(outside) == set()


@pytest.mark.parametrize("name", ["../outside", "/outside", "MoMA_llava_7b/../../outside", "..\\outside"])
def test_only_listed_models_are_read(roots: Path, name: str) -> None:
    llava_folder(roots.parent / "outside")
    for node in (LoadMllm.validate_inputs(name), ConvertMllm.validate_inputs(name, "x")):
        assert f"there is no MLLM {name!r}" in str(node)


def test_cancel_and_progress_in_a_node(roots: Path) -> None:
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ConvertMllm.execute("MoMA_llava_7b", "keep", "x")
    assert not (roots / "x.safetensors").exists()
    ConvertMllm.execute("MoMA_llava_7b", "keep", "x")
    assert (roots / "x.safetensors").exists()


def _edit(**changes: Any) -> Callable[[Path], None]:
    """Change the metadata; entries that are None go."""

    def edit(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = {k: v for k, v in ({**file.metadata()} | changes).items() if v is not None}
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
        save_file(tensors, path, metadata)

    return edit


def _tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Change the tensors; those that are None go."""

    def edit(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            keys, metadata = file.keys(), file.metadata()
            tensors = {key: file.get_tensor(key) for key in keys} | changes
        save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata)

    return edit


UP = "language.layers.0.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is not a readable .safetensors file"),
    "absurd header": (lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f{}"), "is not a readable .safetensors file"),
    "huge header": (lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), "is not a readable"),
    "text": (lambda path: path.write_text("<html>", encoding="utf-8"), "is not a readable .safetensors file"),
    "format": (_edit(format="lora"), r"is not a converted MoMA MLLM \(format 'lora'\)"),
    "version": (_edit(version="2"), "has format version '2'; this version of the pack reads 1. Update ComfyUI-MoMA"),
    "config": (_edit(config="{"), "the config in its metadata is not readable JSON"),
    "nested config": (_edit(config="[" * 100_000), "the config in its metadata is not readable JSON"),
    "no tokenizer": (_tensors(tokenizer=None), "lacks its config or the bytes of its tokenizer"),
    "bad tokenizer": (_tensors(tokenizer=torch.ones(50, dtype=torch.uint8)), "is not a readable sentencepiece model"),
    "missing": (_tensors(**{UP: None}), f"is incomplete: weight '{UP}' is missing"),
    "unknown": (_tensors(extra=torch.ones(1)), "weight 'extra' has no place"),
    "no scale": (_tensors(**{UP + "_scale": None}), f"'{UP}_scale', which scales an 8-bit weight, is missing"),
    "nan scale": (_tensors(**{UP + "_scale": torch.full((176,), torch.nan)}), r"expected finite float32 \(176,\)"),
    "scale shape": (_tensors(**{UP + "_scale": torch.ones(3)}), r"is torch\.float32 \(3,\); expected finite"),
    "shape": (
        _tensors(**{UP: torch.ones(3, 3, dtype=torch.int8)}),
        r"is torch\.int8 \(3, 3\), expected a .*\(176, 64\)",
    ),
    "dtype": (
        _tensors(**{"language.norm.weight": torch.ones(64, dtype=torch.int8)}),
        r"'language\.norm\.weight' is torch\.int8 \(64,\), expected a 16- or 32-bit floating-point one",
    ),
}


@pytest.mark.parametrize("read", [read_mapped, read_as_comfyui])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_by_name(target: Path, kind: str, read: Reader) -> None:
    convert_mllm(CHECKPOINT, target, "int8", ignore)
    break_it, message = BROKEN[kind]
    break_it(target)
    with pytest.raises(ValueError, match=rf"(?s)small\.safetensors.*{message}"):
        read_checkpoint(target, 4, read)
    find_checkpoints([target.parent])


def mapped(path: Path) -> bool:
    """Whether this process maps the file or one in the folder."""
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_the_file_is_mapped_not_read(tmp_path: Path, target: Path) -> None:
    convert_mllm(llava_folder(tmp_path / "llava"), target, "keep", ignore)
    read = read_checkpoint(target)
    assert mapped(target)
    assert read.language["norm.weight"].isfinite().all()


@pytest.mark.parametrize("form", ["converted", "one .bin", ".safetensors in shards"])
def test_files_are_mapped_unless_comfyui_was_told_not_to(
    tmp_path: Path, target: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`DISABLE_MMAP` is what ComfyUI makes of --disable-mmap."""
    assert comfy.cli_args.args.disable_mmap == comfy.utils.DISABLE_MMAP
    path = llava_folder(tmp_path / "llava")
    if form == "converted":
        convert_mllm(path, target, "int8", ignore)
        path = target
    else:
        FORMS[form](path, _shards(path))
    for disabled in (True, False):
        monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", disabled)
        loaded = load_mllm(path, "auto").loaded
        assert mapped(path) != disabled
        del loaded
        gc.collect()
    assert not mapped(path)


@pytest.mark.parametrize("precision", ["keep", "fp8", "int8"])
def test_weights_stay_what_comfyuis_loader_gave(
    tmp_path: Path, target: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under dynamic VRAM it marks each storage with its place in the file, and reads from there to the card."""
    convert_mllm(llava_folder(tmp_path / "llava"), target, precision, ignore)
    load = comfy.utils.load_torch_file

    def marking(*args: Any, **kwargs: Any) -> Any:
        tensors, metadata = load(*args, **kwargs)
        for tensor in tensors.values():
            tensor.untyped_storage()._comfy_tensor_file_slice = tensor.nbytes
        return tensors, metadata

    monkeypatch.setattr(comfy.utils, "load_torch_file", marking)
    # Whatever this processor is fast at: where weights are cast once, they are no longer the file's.
    machine = replace(Machine.measure(torch.device("cpu")), bf16_gain=1.0)
    module = load_mllm(target, "auto", machine=machine).loaded.module
    large = {key: weight for key, weight in module.named_parameters() if weight.ndim == 2}
    assert len(large) > 40
    for key, weight in large.items():
        assert getattr(weight.untyped_storage(), "_comfy_tensor_file_slice", None) == weight.nbytes, key
        assert weight.storage_offset() == 0 and weight.is_contiguous(), key


def _shards(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder's shards, which go with their index."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("pytorch_model-*.bin"):
        tensors |= torch.load(path)
        path.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    return tensors


def _in_two(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    keys = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


FORMS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Any]] = {
    "one .bin": lambda folder, tensors: torch.save(tensors, folder / "pytorch_model.bin"),
    "one .safetensors": lambda folder, tensors: save_file(tensors, folder / "model.safetensors"),
    ".safetensors in shards": _in_two,
}


@pytest.mark.parametrize("form", FORMS)
def test_folders_in_other_forms_are_the_same_model(tmp_path: Path, form: str) -> None:
    folder = llava_folder(tmp_path / "llava")
    before = weights(folder)
    FORMS[form](folder, _shards(folder))
    after = weights(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_hub_snapshot_is_found_and_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--KunpengSong--MoMA_llava_7b" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    source = llava_folder(tmp_path / ".hidden")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert find_checkpoints([tmp_path]) == {"models--KunpengSong--MoMA_llava_7b/snapshots/abc": snapshot}
    assert weights(snapshot).keys() == weights(source).keys()
    (blobs / "3").unlink()
    with pytest.raises(ValueError, match="snapshots/abc is incomplete: .* is missing"):
        read_checkpoint(snapshot)


def test_links_in_circles_end(tmp_path: Path) -> None:
    llava_folder(tmp_path / "llava")
    for number in range(12):
        (tmp_path / f"up{number}").symlink_to(tmp_path)
        (tmp_path / "llava" / f"up{number}").symlink_to(tmp_path.parent)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "self.safetensors").symlink_to(tmp_path / "self.safetensors")
    (tmp_path / "other").symlink_to(tmp_path / "llava")
    assert set(find_checkpoints([tmp_path])) == {"llava", "other"}


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a\\b.bin", "", 5])
def test_an_index_that_leads_out_is_refused(tmp_path: Path, name: Any) -> None:
    folder = llava_folder(tmp_path / "llava")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": name}}), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=r"index\.json names .*, which is not a file of that folder\. Get it again from"
    ):
        read_checkpoint(folder)
