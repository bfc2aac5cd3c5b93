"""The small world's files as nodes offer them: checkpoints in the model folders, and pictures of this pack's own."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..host.folders import MODELS, OWN_WEIGHTS, file_names, file_path, searched
from .checkpoint import is_mini_checkpoint

_EXAMPLES = OWN_WEIGHTS / "examples"


def mini_names() -> list[str]:
    """The small checkpoints below the model folders, by relative name."""
    paths = {name: file_path(MODELS, name) for name in file_names(MODELS) if name.endswith(".safetensors")}
    return sorted(name for name, path in paths.items() if path is not None and is_mini_checkpoint(path))


def mini_path(name: str) -> Path:
    """The file of a small checkpoint.

    Raises:
        FileNotFoundError: Saying where was looked for it and what was found.
    """
    path = file_path(MODELS, name) if name in mini_names() else None
    if path is None:
        raise FileNotFoundError(
            f"ckpt_name: there is no small checkpoint {name!r}. {searched(MODELS, mini_names())} One comes with this "
            f"pack, in {OWN_WEIGHTS}: if it is not there, install the pack again. Other checkpoints are loaded with "
            "Load Checkpoint."
        )
    return path


def example_names() -> list[str]:
    """Names of the pictures, such as `striped cup`."""
    return sorted(path.stem.replace("_", " ") for path in _EXAMPLES.glob("*.png"))


def load_example(name: str) -> tuple[Tensor, Tensor]:
    """A picture [1, H, W, 3] in 0..1 and the mask of its subject [1, H, W], as ComfyUI's Load Image gives them.

    Raises:
        FileNotFoundError: There is none of this name.
    """
    path = _EXAMPLES / f"{name.replace(' ', '_')}.png"
    if name not in example_names():
        raise FileNotFoundError(f"example: there is no picture {name!r}, only: {', '.join(example_names())}.")
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGBA"))).float() / 255
    return pixels[None, ..., :3].clone(), 1 - pixels[None, ..., 3]
