"""Saving subjects under a name that a graph gives: numbered, never over another file, never outside the folder."""

import os
import re
from pathlib import Path

import folder_paths

from ..subject import Subject, save_subject
from .folders import SUBJECTS

SUFFIX = ".safetensors"
LONGEST = 200
"""Bytes of a name; systems allow 255, and the number and suffixes come on top."""

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]')
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM\d|LPT\d)", re.IGNORECASE)


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
    prefix = _portable(prefix)
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
    """Check that a prefix is a file name, with subfolders if wanted, that every system can have.

    Raises:
        ValueError: Naming the input, what is wrong with it and what to do.
    """
    *folders, name = _portable(prefix).split("/")
    problem = None
    if not name.strip():
        problem = "ends without a name"
    elif folders[:1] == [""]:
        problem = "is an absolute path; subjects are saved below output/moma_subjects only"
    elif ".." in (*folders, name):
        problem = "leads out of its folder with '..'; subjects are saved below output/moma_subjects only"
    else:
        problem = next(filter(None, map(_problem, [*folders, f"{name}_0{SUFFIX}"])), None)
    if problem:
        raise ValueError(f"filename_prefix {prefix[:80]!r} {problem}. Give a name such as 'cup' or 'cars/red'.")


def _portable(prefix: str) -> str:
    return prefix.strip().replace("\\", "/")


def _problem(part: str) -> str | None:
    """What keeps some system from having a file or folder of this name."""
    if found := _FORBIDDEN.search(part):
        return f"holds {found[0]!r}, which not every system allows in a file name"
    if not part.rstrip(". "):
        return f"has the folder name {part!r}"
    if part != part.rstrip(". "):
        return f"has the folder name {part!r}, which ends in a dot or space"
    if _DEVICES.fullmatch(part.split(".")[0].rstrip()):
        return f"has the name {part.removesuffix(SUFFIX).removesuffix('_0')!r}, which is a device on Windows"
    if len(part.encode()) > LONGEST:
        return f"has a name of {len(part.encode())} bytes; at most {LONGEST} are possible"
    return None


def _check_inside(root: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"filename_prefix leads to {folder.resolve()}, which is outside {root}: there is a link on the way. "
            "Choose another subfolder, or make the whole folder a link."
        )
