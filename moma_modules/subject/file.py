"""Saved subjects: one `.safetensors` file each, numbered, never over another file, never outside the folder.

Subjects of one picture can share a file of picture and mask, which lies beside them and is named after its content.
"""

import os
from pathlib import Path

import folder_paths
import torch
from safetensors.torch import save
from torch import Tensor

from ..host.disk import SUFFIX, check_new_name, content_hash, portable, written_whole
from ..host.folders import SUBJECTS, file_names, file_path, searched
from ..host.weight_files import Header, read_header, read_safetensors
from .subject import Subject


def subject_names() -> list[str]:
    """Saved subjects, by relative name."""
    return [name for name in file_names(SUBJECTS) if name.endswith(".safetensors")]


def subject_path(name: str) -> Path:
    """The file of a saved subject; after a name, ` [input]` stands for ComfyUI's input folder, as in Load Image.

    Raises:
        FileNotFoundError: Saying what was looked for, where, and what was found.
    """
    if portable(name).endswith(IN_INPUT):
        return _input_path(name)
    path = file_path(SUBJECTS, name) if portable(name) in subject_names() else None
    if path is not None:
        return path
    raise FileNotFoundError(
        f"subject_name: there is no saved subject {name!r}. {searched(SUBJECTS, subject_names())} "
        "Save one with Save MoMA Subject, as the workflow new_context does, or copy a file there, then press R to "
        "refresh."
    )


def _input_path(name: str) -> Path:
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / portable(name).removesuffix(IN_INPUT)).resolve()
    if not (path.is_relative_to(root) and path.suffix == SUFFIX and path.is_file()):
        raise FileNotFoundError(f"subject_name: there is no saved subject {name!r} in ComfyUI's input folder {root}.")
    return path


FORMAT = "moma_subject"
WHOLE, SHARED = "1", "2"
"""Versions of the format: with the pictures in it, or with their name."""
NAMES = ("embedding", "images", "masks")
"""The tensors of a saved subject, in alphabetical order."""
PICTURES = "pictures"
"""The entry with the name of a shared file of pictures, and how that file ends."""
IN_INPUT = " [input]"


def save_numbered(subject: Subject, prefix: str, separate_pictures: bool = False) -> Path:
    """Save as `output/moma_subjects/PREFIX_NUMBER_.safetensors`, with the next free number.

    Args:
        prefix: A name, with subfolders if wanted; %year% and the like are filled in, as in Save Image.
        separate_pictures: See `save_subject`.

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
            save_subject(subject, path, separate_pictures)
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


def save_subject(subject: Subject, path: Path, separate_pictures: bool = False) -> None:
    """Write a subject to a new `.safetensors` file, which appears only once it is complete.

    Args:
        separate_pictures: Leave pictures and masks to a file beside it, which other subjects in that folder may share.

    Raises:
        FileExistsError: The file is there, or another thread or process is just writing it.
    """
    embedding = {"embedding": subject.embedding.contiguous()}
    pictures = {"images": subject.images.contiguous(), "masks": subject.masks.to(torch.uint8).contiguous()}
    metadata = {
        "format": FORMAT,
        "version": SHARED if separate_pictures else WHOLE,
        "subject": subject.word,
        "prompt": subject.prompt,
        "adapter": subject.adapter_identity,
    }
    if separate_pictures:
        metadata[PICTURES] = content_hash(pictures["images"], pictures["masks"])
        beside = path.with_name(f"{metadata[PICTURES]}.{PICTURES}")
        if not beside.is_file():
            with written_whole(beside) as partial:
                partial.write_bytes(save(pictures))
    with written_whole(path, new=True) as partial:
        partial.write_bytes(save(embedding if separate_pictures else embedding | pictures, metadata))


def pictures_path(path: Path) -> Path | None:
    """The file that a saved subject shares with others; None if it has its pictures in it."""
    name = read_header(path).metadata.get(PICTURES)
    return path.with_name(f"{name}.{PICTURES}") if name else None


def load_subject(path: Path) -> Subject:
    """Read a saved subject.

    Raises:
        ValueError: The file is unreadable, of another kind, of a newer format version, or has wrong content.
    """
    header = read_header(path)
    _check_format(header.metadata, path)
    if header.metadata["version"] == SHARED:
        tensors = _read_shared(header, path)
    else:
        _check_shapes(header, path)
        tensors = read_safetensors(path)
    embedding, images, masks = (tensors[name] for name in NAMES)
    if not embedding.isfinite().all():
        raise ValueError(f"{path}: the embedding holds NaN or infinite values.")
    if not masks.flatten(1).any(dim=1).all():
        raise ValueError(f"{path}: a mask is empty.")
    return Subject(
        embedding=embedding,
        word=header.metadata["subject"],
        prompt=header.metadata["prompt"],
        images=images,
        masks=masks > 0,
        adapter_identity=header.metadata["adapter"],
    )


def _read_shared(header: Header, path: Path) -> dict[str, Tensor]:
    """The tensors of a subject whose pictures lie beside it."""
    name = header.metadata.get(PICTURES, "")
    beside = path.with_name(f"{name}.{PICTURES}")
    if not (name.isalnum() and beside.is_file()):
        raise ValueError(
            f"{path} shares its pictures with other subjects, in {beside.name[:90]}, which is not beside it. Copy both "
            "files, or save the subject again."
        )
    pictures = read_header(beside)
    _check_shapes(Header(header.metadata, {**header.tensors, **pictures.tensors}), path)
    tensors = {**read_safetensors(path), **read_safetensors(beside)}
    if content_hash(tensors["images"], tensors["masks"]) != name:
        raise ValueError(f"{beside} does not hold the pictures that it is named after. Copy it again.")
    return tensors


def _check_format(metadata: dict[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved MoMA subject (format {metadata.get('format')!r}).")
    version = metadata.get("version", "")
    if version not in (WHOLE, SHARED):
        raise ValueError(
            f"{path} has format version {version!r}; this version of the pack reads {WHOLE} and {SHARED}. "
            "Update ComfyUI-MoMA, or save the subject again."
        )
    missing = [key for key in ("subject", "prompt", "adapter") if key not in metadata]
    if missing:
        raise ValueError(f"{path} lacks the entry {missing[0]!r}; save the subject again.")
    if not metadata["subject"].strip():
        raise ValueError(f"{path} has no subject word; save the subject again.")


def _check_shapes(header: Header, path: Path) -> None:
    """Check what the header says of the tensors, before they are read."""
    if sorted(header.tensors) != list(NAMES):
        found = ", ".join(name[:60] for name in sorted(header.tensors)[:8]) or "nothing"
        raise ValueError(f"{path} should hold embedding, images and masks, found {found}.")
    dtypes, shapes = ({name: header.tensors[name][i] for name in NAMES} for i in (0, 1))
    count, side = (*shapes["images"], 0, 0)[:2]
    width = (shapes["embedding"] or (0,))[-1]
    expected = {
        "embedding": ("F32", (1, width), "[1, size]"),
        "images": ("U8", (count, side, side, 3), "[pictures, size, size, 3]"),
        "masks": ("U8", (count, side, side), f"[pictures, {side}, {side}], one for each of {count} images"),
    }
    for name, (dtype, shape, words) in expected.items():
        if dtypes[name] != dtype or shapes[name] != shape or 0 in shape:
            raise ValueError(
                f"{path}: {name} is {dtypes[name]} {shapes[name]}, expected {dtype} {words}. Save the subject again."
            )
