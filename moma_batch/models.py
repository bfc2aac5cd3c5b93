"""Where a ComfyUI of the user's lies, what can run it, and what the weights are that a graph names."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .jobs import Graph
from .table import TableError

_FOLDERS = {
    "ckpt_name": "checkpoints",
    "adapter_name": "moma",
    "model_name": "moma",
    "lora_name": "loras",
    "vae_name": "vae",
    "control_net_name": "controlnet",
    "bg_removal_name": "background_removal",
}
_EDGE = 1 << 20
SMALL = "moma_mini"
"""How the names of the weights begin that come with the pack."""


def find_comfyui(named: Path | None) -> Path:
    """The ComfyUI of the command line, of `COMFYUI_PATH`, or the one in whose custom_nodes this pack lies.

    Raises:
        TableError: There is none.
    """
    inherited = os.environ.get("COMFYUI_PATH")
    above = Path(__file__).resolve().parents[3]
    for path in filter(None, (named, Path(inherited) if inherited else None, above)):
        if (path / "main.py").is_file():
            return path.resolve()
        if path is not above:
            raise TableError(f"There is no ComfyUI in {path}.")
    raise TableError("No ComfyUI: name its folder with --comfyui, or servers that run already with --server.")


def find_python(named: str | None, comfyui: Path) -> str:
    """The Python for it: of the command line, of `COMFYUI_PYTHON`, its own environment, or this one."""
    own = [comfyui / ".venv", comfyui / "venv", comfyui.parent / "python_embeded"]
    files = [folder / part for folder in own for part in ("bin/python", "Scripts/python.exe", "python.exe")]
    there = next((str(file) for file in files if file.is_file()), sys.executable)
    return named or os.environ.get("COMFYUI_PYTHON") or there


def graphics_cards() -> int:
    """How many NVIDIA cards the driver lists."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    done = subprocess.run([program, "-L"], capture_output=True, encoding="utf-8", errors="replace", check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def may_have_weights(comfyui: Path, arguments: Sequence[str]) -> bool:
    """Whether a ComfyUI may have MoMA's weights, beside the small ones that come with the pack.

    Args:
        arguments: Of its command line. One that names further folders for models leaves it open.
    """
    if any(word.startswith("--extra-model-paths-config") for word in arguments):
        return True
    if (comfyui / "extra_model_paths.yaml").is_file():
        return True
    named = list(arguments)
    base = Path(named[named.index("--base-directory") + 1]) if "--base-directory" in named[:-1] else comfyui
    return any(path.is_file() for path in (base / "models" / "moma").rglob("*"))


def are_small(adapters: Sequence[str]) -> bool:
    """Whether these adapters of a server, its choices, are those of the pack alone."""
    return bool(adapters) and all(name.startswith(SMALL) for name in adapters)


class Weights:
    """What the files are that a graph names, in the models folder of a ComfyUI."""

    def __init__(self, comfyui: Path) -> None:
        """Look below `models`."""
        self._models = comfyui / "models"

    def identity(self, graph: Graph) -> list[str]:
        """For each file that is there: its size, and a digest of its first and last megabyte."""
        found = set()
        for node in graph.values():
            for key, folder in _FOLDERS.items():
                name = node["inputs"].get(key)
                if isinstance(name, str) and (path := self._models / folder / name).is_file():
                    found.add(f"{key} {_fingerprint(path)}")
        return sorted(found)


@lru_cache(maxsize=256)
def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return f"{size}-{digest.hexdigest()[:32]}"
