"""Adapter files and saved subjects: what is read, written, converted and refused."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.adapter.file import convert_adapter, is_adapter, read_adapter
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.host.disk import locked
from comfyui_moma.moma_modules.host.weight_files import readable
from comfyui_moma.moma_modules.subject.file import load_subject, save_subject
from comfyui_moma.moma_modules.subject.reference_image import prepare_references
from comfyui_moma.nodes.subject import SaveSubject
from safetensors import safe_open
from safetensors.torch import save_file

from workbench import ROOT
from workbench.scene import tiny_adapter, tiny_subject
from workbench.tiny_models import adapter_groups

Groups = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def adapter_path(tmp_path: Path) -> Path:
    """A small adapter in half precision, with keys that nobody needs."""
    groups = adapter_groups(embedding=8, hidden=16)
    halves = {name: {key: value.half() for key, value in group.items()} for name, group in groups.items()}
    halves["llm_mapping"]["vlm.something_else"] = torch.zeros(3)
    path = tmp_path / "attn_adapters_projectors.th"
    torch.save(halves, path)
    return path


def test_the_converted_adapter_is_the_same(adapter_path: Path) -> None:
    target = adapter_path.with_suffix(".safetensors")
    before = adapter_path.read_bytes()
    command = [sys.executable, "-m", "moma_modules.convert_adapter", str(adapter_path), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and target.name in done.stdout, done.stderr
    assert adapter_path.read_bytes() == before and not list(adapter_path.parent.glob("*.part"))
    old, new = read_adapter(adapter_path), read_adapter(target)
    assert is_adapter(target) and new.identity == old.identity and new.scales == old.scales
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(old.tensors[key], new.tensors[key]) for key in old.tensors)
    assert {tensor.dtype for tensor in new.tensors.values()} == {torch.float16}


def test_several_conversions_at_once_end_with_one_good_file(adapter_path: Path) -> None:
    target = adapter_path.with_suffix(".safetensors")
    with ThreadPoolExecutor(4) as pool:
        identities = {done.identity for done in pool.map(lambda _: convert_adapter(adapter_path, target), range(8))}
    assert identities == {read_adapter(target).identity}
    assert {path.name for path in adapter_path.parent.iterdir()} == {adapter_path.name, target.name}


def test_a_lock_ends_well_where_open_files_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows; the next one gets the lock."""
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".lock":
            raise PermissionError(13, "in use", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        with locked(tmp_path / "weights", waiting=lambda: pytest.fail("the lock was not given back")):
            (tmp_path / "weights").touch()


def test_the_converter_refuses_another_suffix(adapter_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^The target must end in \.safetensors, got adapter\.bin"):
        convert_adapter(adapter_path, adapter_path.with_name("adapter.bin"))


def test_sizes_come_from_the_file(adapter_path: Path) -> None:
    adapter = load_adapter(adapter_path)
    assert (adapter.sizes.embedding, adapter.sizes.hidden, adapter.sizes.context) == (8, 16, 64)
    assert adapter.sizes.layers[:2] == (32, 32) and len(adapter.sizes.layers) == 32 and len(adapter.scales) == 16
    for dtype in (torch.float32, torch.bfloat16):  # computed in the dtype of the input, whatever is stored
        assert adapter.module.projector(torch.zeros(2, 8, dtype=dtype)).dtype == dtype
    assert adapter.map_hidden_state(torch.ones(1, 16)).shape == (1, 8)


@pytest.mark.parametrize("form", ["th", "safetensors"])
def test_the_side_of_references_comes_from_the_file(adapter_path: Path, form: str) -> None:
    plain = read_adapter(adapter_path)
    assert plain.reference_size == 512
    torch.save({**torch.load(adapter_path), "reference_size": torch.tensor([128.0])}, adapter_path)
    if form == "safetensors":
        convert_adapter(adapter_path, adapter_path.with_suffix(".safetensors"))
    adapter = load_adapter(adapter_path.with_suffix(f".{form}"))
    assert adapter.reference_size == 128 and adapter.identity != plain.identity
    references = prepare_references(torch.rand(1, 40, 60, 3), None, size=adapter.reference_size)
    assert references.images.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("size", [[0.0], [100.0], [128.0, 128.0], [float("nan")], [1e9]])
def test_a_side_that_no_reference_can_have_is_refused(adapter_path: Path, size: list[float]) -> None:
    torch.save({**torch.load(adapter_path), "reference_size": torch.tensor(size)}, adapter_path)
    with pytest.raises(ValueError, match=r"reference_size is \[.*\], expected one number of pixels, a multiple of 64"):
        read_adapter(adapter_path)


def test_subjects_of_any_side_are_saved(tmp_path: Path) -> None:
    subject = tiny_subject(tiny_adapter())
    save_subject(subject, tmp_path / "small.safetensors")
    assert load_subject(tmp_path / "small.safetensors").images.shape == (1, 64, 64, 3)


def _edit(change: Callable[[Groups], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        groups = torch.load(path, weights_only=True)
        change(groups)
        torch.save(groups, path)

    return edit


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:2000]), r"is not a readable PyTorch file \(trunc"),
    "text": (
        lambda path: path.write_text("<html>not found</html>", encoding="utf-8"),
        "was refused: it is truncated, not a PyTorch",
    ),
    "a list": (lambda path: torch.save([1], path), "holds a list, not the groups of a MoMA adapter"),
    "group": (_edit(lambda g: g.pop("llm_mapping")), r"group 'llm_mapping' is missing \(found: projectors"),
    "key": (_edit(lambda g: g["self_cross_attentions"].pop("7.to_v_ip.weight")), r"'self_cross_.*7\.to_v_ip\.weight'"),
    "shape": (_edit(lambda g: g["projectors"].update({"proj.bias": torch.zeros(3)})), r"'projectors\.proj\.bias'.*3"),
    "nan": (
        _edit(lambda g: g["projectors"]["norm.weight"].fill_(torch.nan)),
        r"'projectors\.norm\.weight' holds NaN",
    ),
    "integers": (
        _edit(lambda g: g["projectors"].update({"norm.bias": torch.zeros(64, dtype=torch.int32)})),
        r"'projectors\.norm\.bias' should be a floating-point tensor",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_refused_by_name(adapter_path: Path, kind: str) -> None:
    break_it, message = BROKEN[kind]
    break_it(adapter_path)
    with pytest.raises(ValueError, match=rf"attn_adapters_projectors\.th.*{message}"):
        read_adapter(adapter_path)


def test_code_in_an_adapter_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "harm"

    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (target,))

    torch.save({"projectors": Harm()}, tmp_path / "adapter.th")
    with pytest.raises(ValueError, match="was refused: .*holds code instead of weights"):
        read_adapter(tmp_path / "adapter.th")
    assert not target.exists()


@pytest.fixture
def subject() -> Any:
    return tiny_subject(tiny_adapter(), "stuffed animal", size=512)


def test_a_subject_survives_its_file(subject: Any, tmp_path: Path) -> None:
    save_subject(subject, tmp_path / "s.safetensors")
    loaded = load_subject(tmp_path / "s.safetensors")
    assert loaded.key == subject.key and torch.equal(loaded.embedding, subject.embedding)
    assert torch.equal(loaded.images, subject.images) and torch.equal(loaded.masks, subject.masks)
    assert (loaded.word, loaded.prompt) == (subject.word, subject.prompt)
    assert loaded.adapter_identity == subject.adapter_identity
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    for other in ({"word": "car"}, {"embedding": subject.embedding + 1}, {"masks": ~subject.masks}):
        assert replace(subject, **other).key != subject.key


def _rewrite(path: Path, metadata: dict[str, str | None], **tensors: torch.Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        content = {key: file.get_tensor(key) for key in ("embedding", "images", "masks")}
        entries = dict(file.metadata())
    kept = {key: value for key, value in (content | tensors).items() if value is not None}
    save_file(kept, path, {key: value for key, value in (entries | metadata).items() if value is not None})


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"format": "lora"}, {}, r"is not a saved MoMA subject \(format 'lora'\)"),
        ({"version": "2"}, {}, "has format version '2'; this version of the pack reads 1. Update ComfyUI-MoMA"),
        ({"prompt": None}, {}, "lacks the entry 'prompt'"),
        ({}, {"masks": None}, "should hold embedding, images and masks, found embedding, images"),
        ({}, {"masks": torch.zeros(1, 512, 512, dtype=torch.uint8)}, "a mask is empty"),
        (
            {},
            {"masks": torch.ones(1, 8, 8, dtype=torch.uint8)},
            r"masks is U8 \(1, 8, 8\), expected U8 \[pictures, 512, 512\], one for each of 1 images",
        ),
        ({}, {"images": torch.zeros(1, 64, 64, 3)}, r"images is F32 \(1, 64, 64, 3\), expected U8 \["),
        ({}, {"embedding": torch.full((1, 48), torch.nan)}, "the embedding holds NaN"),
        ({}, {"embedding": torch.zeros(48)}, r"embedding is F32 \(48,\), expected F32 \[1, size\]"),
    ],
)
def test_a_broken_subject_is_refused_by_name(
    subject: Any, tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    path = tmp_path / "cup.safetensors"
    save_subject(subject, path)
    _rewrite(path, metadata, **tensors)
    with pytest.raises(ValueError, match=rf"cup\.safetensors.*{message}"):
        load_subject(path)


def test_a_truncated_subject_is_refused(subject: Any, tmp_path: Path) -> None:
    path = tmp_path / "cup.safetensors"
    save_subject(subject, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cup\.safetensors is not a readable \.safetensors file"):
        load_subject(path)


@pytest.mark.parametrize("name", ["../car", "/car", "cars/../../car", "C:\\car", "NUL/car", "cars/x:y"])
def test_subjects_are_not_saved_outside_their_folder(subject: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"^filename_prefix .* Give a name such as 'cup' or 'cars/red'\.$"):
        SaveSubject.execute(subject, name)


def test_too_little_memory_is_not_called_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), readable(tmp_path / "whole.safetensors"):
        raise MemoryError
    with pytest.raises(ValueError, match="not a readable"), readable(tmp_path / "broken.safetensors"):
        raise KeyError
