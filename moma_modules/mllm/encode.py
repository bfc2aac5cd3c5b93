"""One forward of the MLLM over (reference, word, prompt)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import numpy as np
import torch
from torch import Tensor, nn

from .image import pixel_values
from .model import LoadedMllm, Mllm
from .prompt import IMAGE_TOKEN, prompt_ids


def subject_hidden_state(mllm: Mllm, image: np.ndarray, mask: np.ndarray, subject: str, prompt: str) -> Tensor:
    """The MLLM's hidden state after reading the instruction: what MoMA makes the subject embedding from.

    Loads the MLLM if it is not yet. Shows progress layer by layer, and can be cancelled at each.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] bool, True on the subject.
        subject: The subject word(s).

    Returns:
        [1, hidden] float32 on the CPU, not yet checked for NaN.
    """
    loaded = mllm.loaded
    _bring_to_device(loaded.patcher)
    return forward(loaded, pixel_values(image, mask, mllm.image_size), prompt_ids(mllm.tokenizer, subject, prompt))


def forward(loaded: LoadedMllm, pixels: Tensor, ids: list[int]) -> Tensor:
    """One pass with a loaded patcher.

    Args:
        pixels: [1, 3, S, S].
        ids: Token ids with one `IMAGE_TOKEN`.

    Returns:
        The last hidden state [1, hidden], float32 on the CPU.
    """
    device, dtype, module = loaded.patcher.load_device, loaded.plan.compute_dtype, loaded.module
    place = ids.index(IMAGE_TOKEN)
    layers = module.layers()
    progress = comfy.utils.ProgressBar(len(layers))
    with _after_each(layers, lambda: _step(progress)):
        features = module.image_features(pixels.to(device, dtype))
        before, after = (module.embed(torch.tensor([part], device=device)) for part in (ids[:place], ids[place + 1 :]))
        hidden = module.last_hidden_state(torch.cat([before, features, after], dim=1))
    return hidden.to("cpu", torch.float32)


def _bring_to_device(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Load through ComfyUI; when that is cancelled or fails, what had arrived goes back."""
    try:
        comfy.model_management.load_models_gpu([patcher])
    except BaseException:  # Cancel is no Exception since ComfyUI 0.30
        patcher.detach()
        raise


def _step(progress: comfy.utils.ProgressBar) -> None:
    progress.update(1)
    comfy.model_management.throw_exception_if_processing_interrupted()  # the bar looks only when it is redrawn


@contextmanager
def _after_each(layers: list[nn.Module], report: Callable[[], None]) -> Iterator[None]:
    handles = [layer.register_forward_hook(lambda *_: report()) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
