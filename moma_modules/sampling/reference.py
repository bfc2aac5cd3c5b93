"""The reference pass: keys and values of the reference for every self-attention layer.

The pictures go through the VAE and the word through CLIP; then the plain UNet runs once over each reference.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..adapter.loading import Adapter
from ..host.disk import content_hash
from ..prompt.text import encode_word
from ..subject.subject import Subject
from .attention import plain_attention
from .caches import KeysValues, ReferenceKey, caches_of
from .settings import Shortcut, SubjectSettings
from .unet import BLOCKS

CUT_TEXT_TOKENS = 4
"""The released code drops the last 4 text embeddings in this pass, and the weights were trained with that."""


_BYPASS_LORA = "bypass_lora"
"""Under this key ComfyUI injects a LoRA that leaves the weights alone: it is part of the model all the same."""


@dataclass(frozen=True)
class EncodedReference:
    """A subject's references and word, encoded; both on the CPU.

    Attributes:
        latent: [N, 4, h, w] float32, as a VAE gives it (not scaled).
        text: The bare subject word(s) [1, L, context].
    """

    latent: Tensor
    text: Tensor


def encode_reference(adapter: Adapter, subject: Subject, vae: Any, clip: Any) -> EncodedReference:
    """Encode what this VAE and this CLIP have not encoded yet for this adapter.

    Args:
        vae: ComfyUI's VAE of an SD1.5 checkpoint.
        clip: Its CLIP.

    Raises:
        ValueError: One of them is not SD1.5's, or the VAE gave NaN.
    """
    caches, pictures = caches_of(adapter), content_hash(subject.images)
    latent = caches.pictures.find(pictures, (vae,))
    if latent is None:
        latent = _latent(subject, vae)
        caches.pictures.keep(pictures, (vae,), latent)
    text = caches.words.find(subject.word, (clip,))
    if text is None:
        text = encode_word(clip, subject.word)
        caches.words.keep(subject.word, (clip,), text)
    return EncodedReference(latent, text)


def _latent(subject: Subject, vae: Any) -> Tensor:
    latent = vae.encode(subject.images.float() / 255).detach().to("cpu", torch.float32)
    if latent.ndim != 4 or latent.shape[1] != 4 or not latent.isfinite().all():
        raise ValueError(
            f"vae gave a latent of shape {tuple(latent.shape)} for the reference picture(s), or NaN. Connect the VAE "
            "of an SD1.5 checkpoint (with NaN: start ComfyUI with --fp32-vae)."
        )
    return latent


def reference_keys_values(
    guider: Any, entry: SubjectSettings, shortcut: Shortcut, options: dict[str, Any], device: torch.device
) -> KeysValues:
    """What every self-attention layer sees of the references: computed now, or kept from an earlier run.

    Args:
        guider: The run's, with its model loaded and its prompts processed.
        options: The run's transformer options; only the choice of attention function is taken from them.

    Returns:
        Blocks where no reference token lies on the subject are absent: these get no shortcut.
    """
    patcher, model = guider.model_patcher, guider.inner_model
    dtype = model.get_dtype_inference()
    extra = _extra_channels(guider.conds)
    key = ReferenceKey(
        content=content_hash(shortcut.latent, shortcut.noise, shortcut.text, entry.subject.masks),
        weights=patcher.patches_uuid,
        sigma=float(model.model_sampling.sigmas[0]),
        dtype=dtype,
        extra_channels=extra,
    )
    attention = options.get("optimized_attention_override")
    patches = (patcher.object_patches[name] for name in sorted(patcher.object_patches))
    parts = (model, attention, *patches, *patcher.injections.get(_BYPASS_LORA, ()))
    parts = tuple(part for part in parts if part is not None)
    cache = caches_of(entry.adapter).references
    found = cache.find(key, parts)
    if found is not None:
        return _moved(found, device)
    with _without_injections(patcher):
        found = _run_references(model, entry, shortcut, attention, extra, device, dtype)
    cache.keep(key, parts, _moved(found, torch.device("cpu")))
    return found


def _moved(found: KeysValues, device: torch.device) -> KeysValues:
    return {block: (k.to(device), v.to(device)) for block, (k, v) in found.items()}


@contextmanager
def _without_injections(patcher: Any) -> Iterator[None]:
    """Take motion modules and the like out of the UNet: they expect the frames and the options of the run."""
    others = [item for key, group in patcher.injections.items() if key != _BYPASS_LORA for item in group]
    ejected = []
    try:
        for item in others if patcher.is_injected else ():
            item.eject(patcher)
            ejected.append(item)
        yield
    finally:
        for item in ejected:
            item.inject(patcher)


def _run_references(
    model: Any,
    entry: SubjectSettings,
    shortcut: Shortcut,
    attention: Any,
    extra_channels: int,
    device: torch.device,
    dtype: torch.dtype,
) -> KeysValues:
    """Run the plain UNet once over each reference at timestep 0, with the weights the run has (LoRA included)."""
    sigma = model.model_sampling.sigmas[:1].to(device, torch.float32)
    text = shortcut.text[:, :-CUT_TEXT_TOKENS].to(device)
    latents = model.process_latent_in(shortcut.latent.to(device, torch.float32))
    noises = shortcut.noise.to(device, torch.float32)
    collected: list[KeysValues] = []
    # One at a time: the memory that ComfyUI set aside is that of the run's own batch, which may be one picture.
    for latent, noise, mask in zip(latents.split(1), noises.split(1), entry.subject.masks, strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        collector = _Collector(entry.adapter, mask, dtype)
        run_options: dict[str, Any] = {
            "patches_replace": {"attn1": {place: _BlockCollector(collector, i) for i, place in enumerate(BLOCKS)}},
            "cond_or_uncond": [0],
            # Other packs' blocks look up, by these, what they know of the rows: of ours, nothing.
            "uuids": [uuid.uuid4()],
            "sigmas": sigma,
        }
        if attention is not None:
            run_options["optimized_attention_override"] = attention
        model.apply_model(
            latent + sigma * noise,
            sigma,
            c_concat=_filled_channels(latent, extra_channels),
            c_crossattn=text,
            transformer_options=run_options,
        )
        collected.append(collector.found)
    return _joined(collected)


def _joined(collected: list[KeysValues]) -> KeysValues:
    """The tokens of all references side by side."""
    blocks = sorted({block for found in collected for block in found})
    parts = {block: [found[block] for found in collected if block in found] for block in blocks}
    return {
        block: (torch.cat([k for k, _ in pairs], dim=1), torch.cat([v for _, v in pairs], dim=1))
        for block, pairs in parts.items()
    }


def _extra_channels(conds: dict[str, list[dict[str, Any]]]) -> int:
    """How many channels the run's prompts bring for the model's input, beside those of the latent."""
    everything = (cond["model_conds"].get("c_concat") for part in conds.values() for cond in part or ())
    return max((concat.cond.shape[1] for concat in everything if concat is not None), default=0)


def _filled_channels(latent: Tensor, extra: int) -> Tensor | None:
    """What a model that is shown pictures beside the latent is shown here: the reference [1, extra, h, w].

    Inpaint checkpoints want a mask first, in which nothing is to be filled in.
    """
    if extra == 0:
        return None
    channels = latent.shape[1]
    mask = torch.zeros_like(latent[:, : extra % channels])
    return torch.cat([mask, *[latent] * (extra // channels)], dim=1)


class _Collector:
    """Keys and values gathered during one reference pass: projected where the adapter is, kept where the run is."""

    def __init__(self, adapter: Adapter, mask: Tensor, dtype: torch.dtype) -> None:
        self.adapter = adapter
        self.dtype = dtype
        self.mask = mask.float()[None, None]
        self.found: KeysValues = {}
        self._places: dict[tuple[int, int], Tensor] = {}

    def collect(self, block: int, k: Tensor, v: Tensor, size: tuple[int, int]) -> None:
        if size not in self._places:
            inside = interpolate(self.mask, size=size, mode="nearest").flatten() > 0
            self._places[size] = inside.nonzero().flatten().to(k.device)
        places = self._places[size]
        if len(places):
            layer = self.adapter.module.layer(2 * block)
            keys, values = (
                projection(part[:, places].to(self.adapter.device)).to(part.device, self.dtype)
                for projection, part in ((layer.to_k_ip, k), (layer.to_v_ip, v))
            )
            self.found[block] = (keys, values)


class _BlockCollector:
    """Self-attention replacement for one block during the reference pass."""

    def __init__(self, collector: _Collector, block: int) -> None:
        self.collector = collector
        self.block = block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        height, width = extra_options["activations_shape"][-2:]
        self.collector.collect(self.block, k, v, (height, width))
        return plain_attention(q, k, v, extra_options)
