"""Saved subjects that share a file with picture and mask."""

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.subject.file import load_subject, save_subject, subject_path
from comfyui_moma.nodes.subject import LoadSubject, SaveSubject

from workbench.scene import tiny_subject


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output and input in a folder of the test."""
    for name, setter in (("output", folder_paths.set_output_directory), ("input", folder_paths.set_input_directory)):
        before = getattr(folder_paths, f"get_{name}_directory")()
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", before)
        setter(str(tmp_path / name))
    return tmp_path


def test_subjects_of_one_picture_share_it(folders: Path, adapter: Any) -> None:
    first, second = tiny_subject(adapter, "car"), tiny_subject(adapter, "cup")
    for subject in (first, second, tiny_subject(adapter, "car", seed=6)):
        shown = SaveSubject.execute(subject, "a/b", separate_pictures=True).ui
    files = sorted((folders / "output" / "moma_subjects" / "a").iterdir())
    assert [path.suffix for path in files].count(".pictures") == 2
    assert [path.suffix for path in files].count(".safetensors") == 3
    small = [path for path in files if path.suffix == ".safetensors"]
    assert all(path.stat().st_size < 5000 for path in small)
    assert shown["moma_pictures"][0]["filename"].endswith(".pictures")
    for subject, path in zip((first, second), small, strict=False):
        loaded = load_subject(path)
        assert (
            loaded.key == subject.key and torch.equal(loaded.masks, subject.masks) and loaded.prompt == subject.prompt
        )
    save_subject(first, folders / "whole.safetensors")
    assert load_subject(folders / "whole.safetensors").key == first.key


def test_a_subject_without_its_pictures_says_what_is_missing(folders: Path, adapter: Any) -> None:
    path = folders / "alone.safetensors"
    save_subject(tiny_subject(adapter), path, separate_pictures=True)
    (beside,) = folders.glob("*.pictures")
    other = folders / "sub"
    other.mkdir()
    save_subject(tiny_subject(adapter, seed=9), other / "x.safetensors", separate_pictures=True)
    (wrong,) = other.glob("*.pictures")
    beside.write_bytes(wrong.read_bytes())
    with pytest.raises(ValueError, match="does not hold the pictures that it is named after"):
        load_subject(path)
    beside.unlink()
    with pytest.raises(
        ValueError, match=r"shares its pictures with other subjects, in .*\.pictures, which is not beside"
    ):
        load_subject(path)


def test_a_subject_in_the_input_folder_is_loaded_and_nothing_outside_of_it(folders: Path, adapter: Any) -> None:
    place = folders / "input" / "runs" / "a"
    place.mkdir(parents=True)
    subject = tiny_subject(adapter)
    save_subject(subject, place / "x.safetensors", separate_pictures=True)
    assert LoadSubject.validate_inputs("runs/a/x.safetensors [input]") is True
    assert LoadSubject.execute("runs\\a\\x.safetensors [input]").args[0].key == subject.key
    save_subject(subject, folders / "out.safetensors")
    (folders / "input" / "linked.safetensors").symlink_to(folders / "out.safetensors")
    for name in (
        "../out.safetensors [input]",
        str(folders / "out.safetensors") + " [input]",
        "none.safetensors [input]",
        "linked.safetensors [input]",
        "runs [input]",
    ):
        with pytest.raises(
            FileNotFoundError, match="subject_name: there is no saved subject .* in ComfyUI's input folder"
        ):
            subject_path(name)
        assert "input folder" in str(LoadSubject.validate_inputs(name))
