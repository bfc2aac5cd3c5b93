"""One forward of the MLLM over (reference, word, prompt): pixels, instruction, hidden state."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from ..host.disk import content_hash
from .beginnings import Beginning
from .loading import LoadedMllm, Mllm
from .packed import Packed, common_length
from .read_ahead import reading_ahead

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

PACK = 2048
"""Tokens of instructions in one forward, so that what it takes of memory stays a fraction of a layer's weights."""

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

    See `subject_hidden_states`, for one text.

    Returns:
        [1, hidden] float32 on the CPU, not yet checked for NaN.
    """
    return next(subject_hidden_states(mllm, image, mask, [(subject, prompt)]))


def subject_hidden_states(
    mllm: Mllm, image: np.ndarray, mask: np.ndarray, texts: Sequence[tuple[str, str]]
) -> Iterator[Tensor]:
    """The hidden states for several texts about one picture.

    Loads the MLLM if it is not yet. Shows progress layer by layer, and can be cancelled at each.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] bool, True on the subject.
        texts: The subject word(s) and the prompt of each.

    Yields:
        For each text in turn [1, hidden] float32 on the CPU, not yet checked for NaN.
    """
    loaded = mllm.loaded
    _bring_to_device(loaded.patcher)
    pixels = pixel_values(image, mask, mllm.image_size)
    instructions = [prompt_ids(mllm.tokenizer, *text) for text in texts]
    yield from looks(loaded, picture_key(image, mask), pixels, instructions)


def picture_key(image: np.ndarray, mask: np.ndarray) -> str:
    """Names a picture [H, W, 3] uint8 with its mask [H, W] bool by their content."""
    return content_hash(repr(image.shape), image.tobytes(), mask.tobytes())


def looks(loaded: LoadedMllm, picture: str, pixels: Tensor, instructions: Sequence[list[int]]) -> Iterator[Tensor]:
    """Instructions about one picture with a loaded patcher, as many in one forward as `PACK` allows.

    What all of a forward begin with is computed once, and not at all where it is kept from before.

    Args:
        picture: Names its content.
        pixels: [1, 3, S, S].
        instructions: Token ids with one `IMAGE_TOKEN` each.

    Yields:
        For each in turn the last hidden state [1, hidden], float32 on the CPU.
    """
    kept = loaded.beginnings.get(picture)
    packs = deque(_packs(instructions))
    module = loaded.module
    layers = module.layers() if kept is None else list(module.language.layers)
    progress = comfy.utils.ProgressBar(len(layers) + (len(packs) - 1) * len(module.language.layers))
    while packs:
        pack = packs.popleft()
        ahead = module.layers() if kept is None else list(module.language.layers)
        with (
            _after_each(module.layers(), lambda: _step(progress)),
            reading_ahead(ahead if loaded.is_in_files else []),
        ):
            on_device, made = _look(loaded, pixels, pack, kept)
        hidden = on_device.to("cpu", torch.float32)
        sound = _is_sound(hidden)
        if len(pack) > 1 and not sound:  # NaN times a weight of 0 is NaN: it reaches those that do not see it, too
            packs.extendleft([ids] for ids in reversed(pack))
            continue
        if kept is None and sound:
            kept = made
            loaded.beginnings.put(picture, made)
        yield from hidden[:, None]


def _is_sound(hidden: Tensor) -> bool:
    """Whether hidden states hold numbers only."""
    return bool(hidden.isfinite().all())


def _packs(instructions: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """In their order, as many in each as have `PACK` tokens behind the picture."""
    pack: list[list[int]] = []
    for ids in instructions:
        if pack and sum(map(len, pack)) + len(ids) > PACK:
            yield pack
            pack = []
        pack.append(ids)
    if pack:
        yield pack


def _look(
    loaded: LoadedMllm, pixels: Tensor, pack: list[list[int]], kept: Beginning | None
) -> tuple[Tensor, Beginning]:
    """One forward.

    Returns:
        The last hidden states [instructions, hidden] on the device, and what to keep if nothing was.
    """
    from .key_values import KeyValues

    device, dtype, module = loaded.patcher.load_device, loaded.plan.compute_dtype, loaded.module
    place = pack[0].index(IMAGE_TOKEN)
    common = min(common_length(pack), min(map(len, pack)) - 1)  # of every ending, the last token is computed
    known = 0 if kept is None else min(common_length([kept.ids, *pack]), common)
    known = known if known > place else 0
    computed = [*pack[0][known:common], *(token for ids in pack for token in ids[common:])]
    embedded = module.embed(torch.tensor([[token for token in computed if token != IMAGE_TOKEN]], device=device))
    if known and kept is not None:
        patches = kept.tokens - len(kept.ids)
    else:
        features = module.image_features(pixels.to(device, dtype))
        patches = features.shape[1] - 1
        embedded = torch.cat([embedded[:, :place], features, embedded[:, place:]], dim=1)
    before = known + patches if known else 0
    packed = Packed(before, common + patches - before, tuple(len(ids) - common for ids in pack))
    key_values = KeyValues([] if kept is None else kept.layers, before, 0 if kept else common + patches)
    states = module.hidden_states(embedded, key_values, packed)[0]
    hidden = torch.stack([states[place] for place in packed.last_tokens()])
    layers = [(keys.to("cpu"), values.to("cpu")) for keys, values in key_values.kept]
    return hidden, Beginning(tuple(pack[0][:common]), layers)


def forward(loaded: LoadedMllm, pixels: Tensor, ids: list[int]) -> Tensor:
    """The whole of one instruction with a loaded patcher, with nothing kept of it or from before.

    Args:
        pixels: [1, 3, S, S].
        ids: Token ids with one `IMAGE_TOKEN`.

    Returns:
        The last hidden state [1, hidden], float32 on the CPU.
    """
    device, dtype, module = loaded.patcher.load_device, loaded.plan.compute_dtype, loaded.module
    place = ids.index(IMAGE_TOKEN)
    features = module.image_features(pixels.to(device, dtype))
    before, after = (module.embed(torch.tensor([part], device=device)) for part in (ids[:place], ids[place + 1 :]))
    return module.hidden_states(torch.cat([before, features, after], dim=1))[:, -1].to("cpu", torch.float32)


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
