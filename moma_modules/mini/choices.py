"""Checkpoints as nodes offer them, those of the small world first, and pictures of this pack's own."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..host.folders import CHECKPOINTS, MODELS, OWN_WEIGHTS, file_names, file_path, searched
from .checkpoint import is_mini_checkpoint

_EXAMPLES = OWN_WEIGHTS / "examples"


def mini_names() -> list[str]:
    """The small checkpoints below the model folders, by relative name."""
    paths = {name: file_path(MODELS, name) for name in file_names(MODELS) if name.endswith(".safetensors")}
    return sorted(name for name, path in paths.items() if path is not None and is_mini_checkpoint(path))


def checkpoint_names() -> list[str]:
    """The small checkpoints, then ComfyUI's own checkpoints, each by relative name."""
    return list(dict.fromkeys([*mini_names(), *file_names(CHECKPOINTS)]))


def checkpoint_path(name: str) -> Path:
    """The file of a checkpoint of `checkpoint_names`.

    Raises:
        FileNotFoundError: Saying where was looked for it and what was found.
    """
    small = name in mini_names()
    path = file_path(MODELS if small else CHECKPOINTS, name)
    if path is None:
        raise FileNotFoundError(
            f"ckpt_name: there is no checkpoint {name!r}. {searched(CHECKPOINTS, file_names(CHECKPOINTS))} Choose one "
            "that is there, or put an SD1.5 checkpoint there and press R. The small one comes with this pack, in "
            f"{OWN_WEIGHTS}: if it is not there, install the pack again."
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


def example_in(image: Tensor) -> str | None:
    """The name of the example among pictures [B, H, W, C]; None if there is none."""
    for name in example_names():
        example, _ = load_example(name)
        if image.shape[1:] == example.shape[1:] and (image.cpu() == example).flatten(1).all(dim=1).any():
            return name
    return None
