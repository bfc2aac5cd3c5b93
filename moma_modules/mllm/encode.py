"""One forward of the MLLM over (reference, word, prompt)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from torch import Tensor, nn

from .image import pixel_values
from .model import Mllm
from .prompt import IMAGE_TOKEN, prompt_ids


def subject_hidden_state(mllm: Mllm, image: np.ndarray, mask: np.ndarray, subject: str, prompt: str) -> Tensor:
    """The MLLM's hidden state after reading the instruction: what MoMA makes the subject embedding from.

    Shows progress layer by layer, and can be cancelled at each.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] bool, True on the subject.
        subject: The subject word(s).

    Returns:
        [1, hidden] float32 on the CPU, not yet checked for NaN.
    """
    comfy.model_management.load_models_gpu([mllm.patcher])
    device, dtype = mllm.patcher.load_device, mllm.compute_dtype
    ids = prompt_ids(mllm.tokenizer, subject, prompt)
    place = ids.index(IMAGE_TOKEN)
    layers = mllm.module.layers()
    progress = comfy.utils.ProgressBar(len(layers))
    with _after_each(layers, lambda: progress.update(1)):
        features = mllm.module.image_features(pixel_values(image, mask, mllm.image_size).to(device, dtype))
        before, after = (
            mllm.module.embed(torch.tensor([part], device=device)).to(dtype) for part in (ids[:place], ids[place + 1 :])
        )
        hidden = mllm.module.last_hidden_state(torch.cat([before, features, after], dim=1))
    return hidden.to("cpu", torch.float32)


@contextmanager
def _after_each(layers: list[nn.Module], report: Callable[[], None]) -> Iterator[None]:
    handles = [layer.register_forward_hook(lambda *_: report()) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
