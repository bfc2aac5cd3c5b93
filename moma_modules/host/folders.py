"""The folders that ComfyUI knows this pack's files in, through its `folder_paths`."""

import os
from pathlib import Path

import folder_paths

from .disk import check_new_name, portable

MODELS, SUBJECTS = "moma", "moma_subjects"
"""ComfyUI's keys of the folders of models and of saved subjects, and what these are called."""

CHECKPOINTS = "checkpoints"
"""ComfyUI's key of its own checkpoints."""

OWN_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
"""The small models that come with this pack."""

OWN_CHECKPOINT, OWN_MLLM, OWN_ADAPTER = "moma_mini.safetensors", "moma_mini_llava", "moma_mini_adapter.safetensors"
"""What these are called, in the order in which a graph loads them."""

_SUFFIXES = {MODELS: {".safetensors", ".th"}, SUBJECTS: {".safetensors"}}


def register_folders() -> None:
    """Make the folders known; paths a user configured stay and come first, what comes with this pack last."""
    folder_paths.add_model_folder_path(MODELS, os.path.join(folder_paths.models_dir, MODELS))
    folder_paths.add_model_folder_path(MODELS, str(OWN_WEIGHTS))
    folder_paths.add_model_folder_path(SUBJECTS, os.path.join(folder_paths.get_output_directory(), SUBJECTS))
    folder_paths.add_model_folder_path(SUBJECTS, os.path.join(folder_paths.models_dir, SUBJECTS))
    folder_paths.add_model_folder_path(SUBJECTS, str(OWN_WEIGHTS / "subjects"))
    for key, suffixes in _SUFFIXES.items():
        paths, known = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = (paths, set(known) | suffixes)


def model_roots() -> list[Path]:
    """The folders in which models are looked for."""
    return [Path(path) for path in folder_paths.get_folder_paths(MODELS)]


def model_folder(name: str) -> Path:
    """The folder of this name in a models folder; in the first of these, if it is in none."""
    places = [root / name for root in model_roots()]
    return next((place for place in places if place.is_dir()), places[0])


def embedding_folders() -> list[str]:
    """ComfyUI's folders of textual inversions."""
    return list(folder_paths.get_folder_paths("embeddings"))


def user_folder(name: str) -> Path:
    """A folder of ours below ComfyUI's user folder, out of reach of HTTP."""
    return Path(folder_paths.get_system_user_directory("moma")) / name


def file_names(key: str) -> list[str]:
    """The files in the folders of `key`, by name relative to their folder."""
    return [portable(name) for name in folder_paths.get_filename_list(key)]


def file_path(key: str, name: str) -> Path | None:
    """The file of that name in the folders of `key`; None if there is none."""
    path = folder_paths.get_full_path(key, portable(name))
    return None if path is None else Path(path)


def searched(key: str, found: list[str]) -> str:
    """For messages: where files were looked for, and what was found."""
    paths = ", ".join(folder_paths.get_folder_paths(key))
    return f"Searched: {paths}. Found: {', '.join(found) or 'nothing'}."


def new_model_path(input_name: str, name: str) -> Path:
    """A place for a new `.safetensors` file below the first models folder, whose folders are made.

    Raises:
        ValueError: The name leads out of that folder, or cannot be a file's on some system.
    """
    check_new_name(input_name, name, f"models/{MODELS}")
    name = portable(name)
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    root = model_roots()[0]
    path = root / name
    if not path.parent.resolve().is_relative_to(root.resolve()) or path.is_symlink():
        raise ValueError(f"{input_name}: {name!r} leads out of {root} by a link; choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
