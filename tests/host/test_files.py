"""Locks, and what is called a broken file."""

from pathlib import Path

import pytest
from comfyui_moma.moma_modules.host.disk import locked
from comfyui_moma.moma_modules.host.weight_files import readable


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


def test_too_little_memory_is_not_called_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), readable(tmp_path / "whole.safetensors"):
        raise MemoryError
    with pytest.raises(ValueError, match="not a readable"), readable(tmp_path / "broken.safetensors"):
        raise KeyError
