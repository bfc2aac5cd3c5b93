"""What a file in a models folder is, by its header. Each is opened once, and again only if it has changed.

ComfyUI asks for the choices of every node whenever the editor is loaded, and folders may lie on a network share.
"""

import json
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

ADAPTER, MLLM, LLAVA = "adapter", "mllm", "llava"
"""A `.safetensors` adapter, a converted MLLM, and the config.json of a LLaVA folder."""

MLLM_FORMAT = "moma_mllm"
"""What the metadata of a converted MLLM says it is."""

_KEPT = 4096
"""Files remembered; the ones not asked for longest are forgotten first."""


def kind_of(path: Path) -> str | None:
    """The kind of a `.safetensors` or `.json` file; None for any other content and for what cannot be read."""
    try:
        status = path.stat()
        return _kind(str(path), status.st_size, status.st_mtime_ns)
    except OSError:  # it may be there again the next time, so it is not remembered
        return None


@lru_cache(maxsize=_KEPT)
def _kind(path: str, size: int, changed: int) -> str | None:
    return _of_json(Path(path)) if path.endswith(".json") else _of_safetensors(path)


def _of_safetensors(path: str) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == MLLM_FORMAT:
                return MLLM
            names = file.keys()
            return ADAPTER if "projectors.proj.weight" in names else None
    except SafetensorError:
        return None


def _of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return LLAVA if isinstance(content, dict) and "mm_projector_type" in content else None
