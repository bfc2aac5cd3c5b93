"""Adapter files: what is read, converted and refused."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.adapter.file import convert_adapter, is_adapter, read_adapter
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.subject.reference_image import prepare_references

from workbench import ROOT
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
