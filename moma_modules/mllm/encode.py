"""One forward of the MLLM over (reference, word, prompt): pixels, instruction, hidden state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from .loading import LoadedMllm, Mllm

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


IMAGE_TOKEN = -200
"""Stands where the image's features go; no id of the vocabulary."""

_BEFORE_IMAGE = "USER: "
_AFTER_IMAGE = "\n A photo of a {subject}. Describe a new image of the same {subject} in: {prompt}. ASSISTANT: *"


def prompt_ids(tokenizer: SentencePieceProcessor, subject: str, prompt: str) -> list[int]:
    """Token ids with one `IMAGE_TOKEN`.

    The text before and after the image is tokenised by itself, as LLaVA does. An `<image>` or `</s>` that a user
    writes stays plain text.
    """
    # One pass, so that "{prompt}" inside a subject word is not filled in.
    text = _AFTER_IMAGE.format(subject=subject, prompt=prompt)
    return [tokenizer.bos_id(), *tokenizer.encode(_BEFORE_IMAGE), IMAGE_TOKEN, *tokenizer.encode(text)]


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
