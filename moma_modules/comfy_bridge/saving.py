"""Saving subjects under a name that a graph gives: numbered, never over another file, never outside the folder."""

import os
from pathlib import Path

import folder_paths

from ..subject import Subject, save_subject
from .file_names import SUFFIX, check_new_name, portable
from .folders import SUBJECTS


def save_numbered(subject: Subject, prefix: str) -> Path:
    """Save as `output/moma_subjects/PREFIX_NUMBER_.safetensors`, with the next free number.

    Args:
        prefix: A name, with subfolders if wanted; %year% and the like are filled in, as in Save Image.

    Raises:
        ValueError: See `check_prefix`; or a link in the subfolder leads out of the folder of subjects.
    """
    check_prefix(prefix)
    root = Path(folder_paths.get_output_directory()) / SUBJECTS
    root.mkdir(parents=True, exist_ok=True)
    prefix = portable(prefix)
    _check_inside(root, root / os.path.dirname(prefix))
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    _check_inside(root, Path(folder))
    while True:
        path = Path(folder) / f"{name}_{number:05}_{SUFFIX}"
        try:
            save_subject(subject, path)
            return path
        except FileExistsError:  # someone else was quicker
            number += 1


def check_prefix(prefix: str) -> None:
    """See `check_new_name`."""
    check_new_name("filename_prefix", prefix, f"output/{SUBJECTS}")


def _check_inside(root: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"filename_prefix leads to {folder.resolve()}, which is outside {root}: there is a link on the way. "
            "Choose another subfolder, or make the whole folder a link."
        )
