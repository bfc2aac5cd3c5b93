"""One step of the adapter's training: the frozen UNet with MoMA's layers, run by the product's own code.

As in MoMA's second stage (arXiv 2404.05674), projector, attention projections, gates and mapping learn by the denoising
loss; the diffusion model stays as it is. `Forward` and the attention patches are those of a run: what is trained is
what is run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from ..moma_modules.sampling.attention import FORWARD, CrossAttentionPatch, SelfAttentionPatch, plain_attention
from ..moma_modules.sampling.caches import KeysValues
from ..moma_modules.sampling.features import ImageTokenLayers, SubjectRun
from ..moma_modules.sampling.forward import Forward
from ..moma_modules.sampling.reference import CUT_TEXT_TOKENS
from ..moma_modules.sampling.rows import Rows
from ..moma_modules.sampling.settings import KEY, ImageTokens, Shortcut, SubjectSettings
from ..moma_modules.sampling.unet import BLOCKS
from .adapter_weights import TrainableAdapter

NO_IMAGE = NO_TEXT = NEITHER = 0.05
"""How often the image embedding, the text or both are zero or empty, for classifier-free guidance (as IP-Adapter)."""

NO_SHORTCUT = 0.05
"""How often there is no shortcut: a user may leave it off."""

NO_MASK = 0.15
"""How often image tokens and shortcut reach the whole picture, as in runs whose subject is not in the prompt."""

FIRST_STEPS = 980
"""From this step on the same: the first evaluation of a run has no subject mask yet (50 steps: from 980 to 999)."""

SHORTCUT_BELOW = 950
"""The shortcut is off in the first 5 % of the schedule, as in a run."""

RawKeysValues = dict[int, list[tuple[Tensor, Tensor]]]
"""Per block and row: keys and values [N, C] of the reference tokens on the subject, before MoMA's projections."""


@dataclass(frozen=True)
class Samples:
    """R rows to learn from.

    Attributes:
        clean: Latents of the target pictures [R, 4, h, w], scaled as the UNet takes them.
        masks: Where the subject is in them [R, h, w], 0..1.
        texts: Text embeddings of their prompts [R, L, context].
        hidden: What the MLLM said of reference, word and prompt [R, hidden].
        references: Latents of the reference pictures [R, 4, h', w'], scaled.
        reference_masks: [R, H, W], True on the subject.
        words: Text embeddings of the bare subject words [R, L, context].
        strengths: Of the shortcut [R]: 1 where the subject keeps its look, 0.4 where the prompt gives it another.
    """

    clean: Tensor
    masks: Tensor
    texts: Tensor
    hidden: Tensor
    references: Tensor
    reference_masks: Tensor
    words: Tensor
    strengths: Tensor


@dataclass(frozen=True)
class Factors:
    """What scales MoMA's two parts in each row, [R, h, w] both, as in a run: mask x strength x schedule."""

    cross: Tensor
    own: Tensor


class FrozenUnet:
    """ComfyUI's UNet of an SD1.5-like model, of which nothing is trained."""

    def __init__(self, unet: Any, shares: Tensor, dtype: torch.dtype, saving_memory: bool = False) -> None:
        """Take the UNet as it is.

        Args:
            shares: The signal's share of the variance at each step [1000].
            dtype: What it computes in.
            saving_memory: Keep no activations for the backward pass but compute them again, block by block.
        """
        self.unet = unet.requires_grad_(False).eval()
        self.shares = shares
        self._dtype = dtype
        self._saving = saving_memory

    def noised(self, latents: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """Latents [R, 4, h, w] with noise, as the UNet is shown them at these steps."""
        share = self.shares.to(latents.device)[steps].view(-1, 1, 1, 1)
        return share.sqrt() * latents + (1 - share).sqrt() * noise

    @torch.no_grad()
    def look(self, latents: Tensor, noise: Tensor, words: Tensor, masks: Tensor) -> RawKeysValues:
        """The reference passes of all rows at once: the plain UNet at step 0 over each reference.

        Args:
            words: Text embeddings of the bare words [R, L, context]; the last ones are cut off, as in a run.
            masks: [R, H, W] bool.
        """
        found: RawKeysValues = {}
        steps = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)

        def collector(block: int) -> Callable[..., Tensor]:
            def collect(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
                size = tuple(extra_options["activations_shape"][-2:])
                inside = interpolate(masks[:, None].float(), size=size, mode="nearest").flatten(1) > 0
                found[block] = [(k[i][row], v[i][row]) for i, row in enumerate(inside)]
                return plain_attention(q, k, v, extra_options)

            return collect

        patches = {"attn1": {place: collector(i) for i, place in enumerate(BLOCKS)}}
        self._run(self.noised(latents, steps, noise), steps, words[:, :-CUT_TEXT_TOKENS], {"patches_replace": patches})
        return found

    def noise_in(
        self,
        adapter: TrainableAdapter,
        noisy: Tensor,
        steps: Tensor,
        texts: Tensor,
        embeddings: Tensor,
        seen: RawKeysValues,
        factors: Factors,
    ) -> Tensor:
        """The noise in `noisy` [R, 4, h, w], with MoMA's layers at work.

        Args:
            embeddings: Subject embeddings [R, embedding], 0 for rows without.
            seen: From `look`.
        """
        subjects = (_image_token_subject(adapter, embeddings, self.unet), *_shortcut_subjects(adapter, seen))
        rows, size = len(noisy), noisy.shape[-2:]
        places = torch.arange(rows * size[0] * size[1], device=noisy.device).view(rows, 1, *size)
        known = Rows(
            tokens=torch.zeros(rows, len(subjects), 1, device=noisy.device),
            positive=torch.arange(rows, device=noisy.device),  # each row has image tokens of its own
            pixels=places,
        )
        own_row = torch.eye(rows, device=noisy.device)[:, :, None, None]

        def forward() -> Forward:
            return Forward(
                x=noisy,
                subjects=subjects,
                rows=known,
                cross_factors=(factors.cross, *[None] * rows),
                self_factors=(None, *(factors.own * own_row[i] for i in range(rows))),
                sparse_shortcut=True,  # each subject's shortcut is computed in its own row only
            )

        self_patches, cross_patches = (
            {place: kind(i) for i, place in enumerate(BLOCKS)} for kind in (SelfAttentionPatch, CrossAttentionPatch)
        )
        options: dict[str, Any] = {
            "patches_replace": {"attn1": self_patches, "attn2": cross_patches},
            KEY: True,
            FORWARD: forward(),
        }
        if self._saving:
            handler = _recomputed(forward)
            layers = [(kind, handler) for kind in (SpatialTransformer, ResBlock)]
            options["patches"] = {"forward_timestep_embed_patch": layers}
        return self._run(noisy, steps, texts, options)

    def _run(self, noisy: Tensor, steps: Tensor, texts: Tensor, options: dict[str, Any]) -> Tensor:
        options["optimized_attention_override"] = _attention
        x, context = noisy.to(self._dtype), texts.to(noisy.device, self._dtype)
        return self.unet(x, steps, context, transformer_options=options).float()


def loss_of(
    frozen: FrozenUnet,
    adapter: TrainableAdapter,
    samples: Samples,
    steps: Tensor,
    empty_text: Tensor,
    weights: Tensor | None = None,
    emphasis: float = 0.0,
) -> Tensor:
    """The denoising loss of these rows at these steps; noise and drops come from torch's generator on the CPU.

    Args:
        empty_text: Text embedding of the empty prompt [1, L, context].
        weights: Of the rows' squared errors [R]; 1 where None.
        emphasis: How much more an error on the subject weighs than one elsewhere.
    """
    noise = torch.randn(samples.clean.shape).to(samples.clean.device)
    errors = squared_errors(frozen, adapter, samples, steps, empty_text, noise)
    errors = (errors * (1 + emphasis * samples.masks[:, None])).mean(dim=(1, 2, 3))
    return (errors if weights is None else errors * weights).mean()


def squared_errors(
    frozen: FrozenUnet,
    adapter: TrainableAdapter,
    samples: Samples,
    steps: Tensor,
    empty_text: Tensor,
    noise: Tensor,
) -> Tensor:
    """Those of the guess at this noise in these rows at these steps [R, 4, h, w]; drops come from torch's generator.

    Args:
        empty_text: Text embedding of the empty prompt [1, L, context].
    """
    rows, device = len(samples.clean), samples.clean.device
    reference_noise = torch.randn(samples.references.shape).to(device)
    drawn = torch.rand(rows).to(device)
    no_image = (drawn < NO_IMAGE) | (drawn >= 1 - NEITHER)
    no_text = ((drawn >= NO_IMAGE) & (drawn < NO_IMAGE + NO_TEXT)) | (drawn >= 1 - NEITHER)
    factors = factors_of(samples.masks, samples.strengths, steps, *torch.rand(2, rows).to(device))
    length = samples.texts.shape[1]
    empty = empty_text.to(samples.texts).repeat(1, length // empty_text.shape[1], 1)
    texts = torch.where(no_text[:, None, None], empty, samples.texts)
    embeddings = adapter.embedding(samples.hidden) * ~no_image[:, None]
    seen = frozen.look(samples.references, reference_noise, samples.words, samples.reference_masks)
    noisy = frozen.noised(samples.clean, steps, noise)
    return (frozen.noise_in(adapter, noisy, steps, texts, embeddings, seen, factors) - noise).square()


def factors_of(masks: Tensor, strengths: Tensor, steps: Tensor, of_mask: Tensor, of_shortcut: Tensor) -> Factors:
    """Where the parts act in training: as in a run at these steps, with the subject's true mask.

    A run finds its mask by itself. In training the true one is at hand; the one found would be that of the pictures as
    the adapter draws them so far.

    Args:
        masks: [R, h, w].
        of_mask, of_shortcut: Chances [R] in 0..1 that decide whether a row is without mask or without shortcut.
    """
    everywhere = (steps >= FIRST_STEPS) | (of_mask < NO_MASK)
    mask = torch.where(everywhere[:, None, None], 1.0, masks)
    on = strengths * (steps < SHORTCUT_BELOW) * (of_shortcut >= NO_SHORTCUT)
    return Factors(cross=mask, own=mask * on[:, None, None])


def _image_token_subject(adapter: TrainableAdapter, embeddings: Tensor, unet: Any) -> SubjectRun:
    """A subject whose image tokens are those of all rows: a row takes what its number says."""
    sizes = tuple(adapter.weights.layer(2 * block + 1).to_k_ip.out_features for block in range(len(BLOCKS)))
    layers = ImageTokenLayers(adapter.image_tokens(embeddings), sizes)
    return SubjectRun(_settings(image_tokens=ImageTokens()), layers, {}, None, None)


def _shortcut_subjects(adapter: TrainableAdapter, seen: RawKeysValues) -> list[SubjectRun]:
    """One subject a row, with its reference's keys and values; in these is the gate, which a run multiplies by."""
    rows = len(seen[0])
    references: list[KeysValues] = [{} for _ in range(rows)]
    for block, pairs in seen.items():
        layer, counts = adapter.weights.layer(2 * block), [len(k) for k, _ in pairs]
        keys, values = (torch.cat([pair[part] for pair in pairs]).to(adapter.gates.dtype) for part in (0, 1))
        keys, values = layer.to_k_ip(keys), layer.to_v_ip(values) * adapter.gates[block]
        for row, (k, v) in enumerate(zip(keys.split(counts), values.split(counts), strict=True)):
            if counts[row]:
                references[row][block] = (k[None], v[None])
    settings = _settings(shortcut=Shortcut(*[torch.empty(0)] * 3))
    return [SubjectRun(settings, None, reference, None, None) for reference in references]


def _settings(**parts: Any) -> SubjectSettings:
    """What a forward reads of a subject's settings: which parts it has, and gates of 1."""
    adapter: Any = SimpleNamespace(scales=(1.0,) * len(BLOCKS))
    nobody: Any = None
    return replace(SubjectSettings(nobody, adapter), **parts)


def _recomputed(forward: Callable[[], Forward]) -> Callable[..., Tensor]:
    """ComfyUI's patch for layers of the UNet: activations are computed again when their gradient is.

    Each layer gets a `Forward` of its own, as what one keeps for later layers would be lost with the activations.
    """

    def handler(layer: Any, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any], *_: Any) -> Tensor:
        if not isinstance(layer, SpatialTransformer):
            return checkpoint(layer, x, emb, use_reentrant=False)
        now = dict(options)  # the UNet goes on to change them

        def run(x: Tensor) -> Tensor:
            return layer(x, context, {**now, FORWARD: forward()})

        return checkpoint(run, x, use_reentrant=False)

    return handler


def _attention(_: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    """PyTorch's attention, which can be trained through in any ComfyUI, on a CPU in float32.

    There its backward pass in bfloat16 is three times slower.
    """
    if q.device.type != "cpu":
        return attention_pytorch(q, k, v, *args, **options)
    with torch.autocast("cpu", enabled=False):
        return attention_pytorch(q.float(), k.float(), v.float(), *args, **options).to(q.dtype)
