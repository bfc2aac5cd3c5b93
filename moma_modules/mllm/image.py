"""The reference image as the MLLM's vision tower takes it."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def pixel_values(image: np.ndarray, mask: np.ndarray, size: int) -> Tensor:
    """CLIP's normalised pixels of the subject on white.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] bool, True on the subject.
        size: Side of the vision tower's input, 336 in the released checkpoint.

    Returns:
        [1, 3, size, size] float32, resized bicubic.
    """
    on_white = np.where(mask[..., None], image, np.uint8(255))
    small = Image.fromarray(on_white, "RGB").resize((size, size), Image.Resampling.BICUBIC)
    values = (np.asarray(small, np.float32) / 255 - _MEAN) / _STD
    return torch.from_numpy(values.transpose(2, 0, 1)[None].copy())
