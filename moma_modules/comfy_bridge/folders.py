"""Where adapters, MLLM folders and saved subjects live, through ComfyUI's `folder_paths`."""

import os
from pathlib import Path

import folder_paths

from ..adapter_file import ADAPTER_SUFFIXES, is_adapter_safetensors

MODELS = "moma"
SUBJECTS = "moma_subjects"
ADDRESS = "https://huggingface.co/KunpengSong/MoMA_llava_7b"


def register_folders() -> None:
    """Make `models/moma` and the folders of saved subjects known; paths a user configured stay and come first."""
    folder_paths.add_model_folder_path(MODELS, os.path.join(folder_paths.models_dir, "moma"))
    folder_paths.add_model_folder_path(SUBJECTS, os.path.join(folder_paths.get_output_directory(), "moma_subjects"))
    folder_paths.add_model_folder_path(SUBJECTS, os.path.join(folder_paths.models_dir, "moma_subjects"))
    for key, suffixes in ((MODELS, set(ADAPTER_SUFFIXES)), (SUBJECTS, {".safetensors"})):
        paths, known = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = (paths, set(known) | suffixes)


def model_roots() -> list[Path]:
    """The folders in which MLLMs and adapters are looked for."""
    return [Path(path) for path in folder_paths.get_folder_paths(MODELS)]


def hidden_states() -> Path:
    """Where the MLLM's results are kept: below the user folder, out of reach of HTTP."""
    return Path(folder_paths.get_system_user_directory("moma")) / "hidden_states"


def adapter_names() -> list[str]:
    """Adapter files below the model folders, by relative name."""
    return [name for name in _names(MODELS) if name.endswith(ADAPTER_SUFFIXES) and _is_adapter(name)]


def subject_names() -> list[str]:
    """Saved subjects, by relative name."""
    return [name for name in _names(SUBJECTS) if name.endswith(".safetensors")]


def adapter_path(name: str) -> Path:
    """The file of an adapter.

    Raises:
        FileNotFoundError: Saying what was looked for, where, what was found, and where to get it.
    """
    if _portable(name) in adapter_names():
        return Path(folder_paths.get_full_path_or_raise(MODELS, _portable(name)))
    raise FileNotFoundError(
        f"adapter_name: there is no adapter {name!r}. {_searched(MODELS, adapter_names())} Download "
        f"attn_adapters_projectors.th from {ADDRESS} into models/moma, then press R to refresh."
    )


def subject_path(name: str) -> Path:
    """The file of a saved subject.

    Raises:
        FileNotFoundError: Saying what was looked for, where, and what was found.
    """
    if _portable(name) in subject_names():
        return Path(folder_paths.get_full_path_or_raise(SUBJECTS, _portable(name)))
    raise FileNotFoundError(
        f"subject_name: there is no saved subject {name!r}. {_searched(SUBJECTS, subject_names())} "
        "Save one with Save MoMA Subject, or copy a file there, then press R to refresh."
    )


def mllm_not_found(name: str, found: list[str]) -> str:
    """The message for an MLLM folder that is not there."""
    return (
        f"model_name: there is no MLLM folder {name!r}. {_searched(MODELS, found)} Download {ADDRESS} (config.json, "
        "tokenizer.model, pytorch_model.bin.index.json and the pytorch_model-*.bin files) into "
        "models/moma/MoMA_llava_7b, then press R to refresh."
    )


def _names(key: str) -> list[str]:
    return [_portable(name) for name in folder_paths.get_filename_list(key)]


def _portable(name: str) -> str:
    """One spelling on every system, so that a workflow saved on Windows finds its files elsewhere, and back."""
    return name.replace("\\", "/")


def _is_adapter(name: str) -> bool:
    if name.endswith(".th"):
        return True
    path = folder_paths.get_full_path(MODELS, name)
    return path is not None and is_adapter_safetensors(Path(path))


def _searched(key: str, found: list[str]) -> str:
    paths = ", ".join(folder_paths.get_folder_paths(key))
    return f"Searched: {paths}. Found: {', '.join(found) or 'nothing'}."
