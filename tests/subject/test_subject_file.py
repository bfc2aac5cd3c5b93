"""Saved subjects: what is read, written and refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.subject.file import load_subject, save_subject
from comfyui_moma.nodes.subject import SaveSubject
from safetensors import safe_open
from safetensors.torch import save_file

from workbench.scene import tiny_adapter, tiny_subject


def test_subjects_of_any_side_are_saved(tmp_path: Path) -> None:
    subject = tiny_subject(tiny_adapter())
    save_subject(subject, tmp_path / "small.safetensors")
    assert load_subject(tmp_path / "small.safetensors").images.shape == (1, 64, 64, 3)


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
        ({"version": "3"}, {}, "has format version '3'; this version of the pack reads 1 and 2. Update ComfyUI-MoMA"),
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
