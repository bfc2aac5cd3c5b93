"""Where adapters, MLLM folders and saved subjects live, through ComfyUI's `folder_paths`."""

import os
from pathlib import Path

import folder_paths

from ..adapter_file import ADAPTER_SUFFIXES
from ..file_kinds import ADAPTER, kind_of
from ..mllm.checkpoint import absent_files, find_checkpoints
from ..mllm.weight_files import incomplete
from ..release import (
    ADAPTER_FILE,
    ADAPTER_NAME,
    ADAPTER_SIZE,
    ADDRESS,
    FOLDER,
    MLLM_FILES,
    MLLM_SIZE,
)
from .file_names import check_new_name, portable

MODELS = "moma"
SUBJECTS = "moma_subjects"

_SWITCH = f"choose {FOLDER} in Load MoMA MLLM and turn on download, an advanced input ({MLLM_SIZE})."


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


def adapter_choices() -> list[str]:
    """What Load MoMA Adapter offers: the files that are there, and the released one."""
    return sorted({*adapter_names(), ADAPTER_NAME})


def adapter_path(name: str) -> Path:
    """The file of an adapter.

    Raises:
        FileNotFoundError: Saying what was looked for, where, what was found, and where to get it.
    """
    if portable(name) in adapter_names():
        return Path(folder_paths.get_full_path_or_raise(MODELS, portable(name)))
    raise FileNotFoundError(
        f"adapter_name: there is no adapter {name!r}. {_searched(MODELS, adapter_names())} Download "
        f"{ADAPTER_FILE} from {ADDRESS} into models/moma/{FOLDER}, then press R to refresh; or choose {ADAPTER_NAME} "
        f"and turn on download, an advanced input of this node ({ADAPTER_SIZE})."
    )


def mllm_choices() -> list[str]:
    """What Load MoMA MLLM offers: the checkpoints that are there, and the released one."""
    return sorted({*find_checkpoints(model_roots()), FOLDER})


def mllm_path(name: str) -> Path:
    """The folder or file of an MLLM, with all its files.

    Raises:
        FileNotFoundError: Saying what was looked for, where, what was found, and where to get it.
        ValueError: An index file in it is unreadable.
    """
    found = find_checkpoints(model_roots())
    path = found.get(portable(name))
    if path is None:
        raise FileNotFoundError(
            f"model_name: there is no MLLM {name!r}. {_searched(MODELS, sorted(found))} Download {ADDRESS} "
            f"({', '.join(MLLM_FILES)}) into models/moma/{FOLDER}, then press R to refresh; or {_SWITCH}"
        )
    absent = absent_files(path)
    if absent:
        raise FileNotFoundError(f"model_name: {incomplete(path, absent)} Or {_SWITCH}")
    return path


def release_folder() -> Path:
    """Where the released files are, or where they are to be downloaded to."""
    places = [root / FOLDER for root in model_roots()]
    return next((place for place in places if place.is_dir()), places[0])


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


def subject_path(name: str) -> Path:
    """The file of a saved subject.

    Raises:
        FileNotFoundError: Saying what was looked for, where, and what was found.
    """
    if portable(name) in subject_names():
        return Path(folder_paths.get_full_path_or_raise(SUBJECTS, portable(name)))
    raise FileNotFoundError(
        f"subject_name: there is no saved subject {name!r}. {_searched(SUBJECTS, subject_names())} "
        "Save one with Save MoMA Subject, or copy a file there, then press R to refresh."
    )


def _names(key: str) -> list[str]:
    return [portable(name) for name in folder_paths.get_filename_list(key)]


def _is_adapter(name: str) -> bool:
    if name.endswith(".th"):
        return True
    path = folder_paths.get_full_path(MODELS, name)
    return path is not None and kind_of(Path(path)) == ADAPTER


def _searched(key: str, found: list[str]) -> str:
    paths = ", ".join(folder_paths.get_folder_paths(key))
    return f"Searched: {paths}. Found: {', '.join(found) or 'nothing'}."
