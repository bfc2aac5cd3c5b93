"""A small complete set-up for sampling tests: adapter, subject, prompts, and ComfyUI's own sampling on them."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from .tiny_models import TINY, adapter_groups, seeded

EMBEDDING = 48
CONTEXT = TINY["cross_attention_dim"]
WORD_TOKENS = (4, 5)
"""Where the subject is in `positive`."""


def tiny_adapter(**changes: Any) -> Any:
    """An Adapter for `tiny_model()`, through a real .th file."""
    from comfyui_moma.moma_modules.adapter.loading import load_adapter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attn_adapters_projectors.th"
        torch.save(adapter_groups(**{"embedding": EMBEDDING, **changes}), path)
        return load_adapter(path)


def tiny_subject(adapter: Any, word: str = "car", seed: int = 5, size: int = 64) -> Any:
    """A subject whose mask is the left half of the reference."""
    from comfyui_moma.moma_modules.subject.subject import Subject

    masks = torch.zeros(1, size, size, dtype=torch.bool)
    masks[..., : size // 2] = True
    images = (seeded(seed, "image", (1, size, size, 3)).clamp(-1, 1) * 127 + 128).to(torch.uint8)
    embedding = seeded(seed, "embedding", (1, adapter.sizes.embedding))
    return Subject(embedding, word, f"A {word} on a table.", images, masks, adapter.identity)


def tiny_shortcut(strength: float = 1.0, **window: Any) -> Any:
    """A Shortcut over an 8x8 reference latent."""
    from comfyui_moma.moma_modules.sampling.settings import Shortcut, Window

    return Shortcut(
        latent=seeded(6, "latent", (1, 4, 8, 8)),
        text=seeded(6, "text", (1, 77, CONTEXT)),
        noise=seeded(6, "noise", (1, 4, 8, 8)),
        strength=strength,
        window=Window(**window),
    )


def moma(model: Any, adapter: Any, subject: Any, weight: float | None = 1.0, shortcut: Any = None) -> Any:
    """`model` with MoMA on it; `weight` None leaves the image tokens out."""
    from comfyui_moma.moma_modules.sampling.patching import settings_of
    from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Settings
    from comfyui_moma.moma_modules.sampling.wrappers import patched

    parts = {} if weight is None else {"image_tokens": ImageTokens(weight)}
    if shortcut is not None:
        parts["shortcut"] = shortcut
    return patched(model, (settings_of(model) or Settings()).with_subject(subject, adapter, **parts))


def compiled(model: Any, backend: str = "eager") -> Any:
    """What TorchCompileModel gives, with another backend than the node offers: "eager" needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import TorchCompileModel, skip_torch_compile_dict

    clone = TorchCompileModel.execute(model, "inductor")[0]
    set_torch_compile_wrapper(model=clone, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


def positive(
    subject: Any | None = None, length: int = 77, seed: int = 7, tokens: tuple[int, ...] = WORD_TOKENS
) -> list:
    """A CONDITIONING; with a subject it knows where the subject's tokens are."""
    from comfyui_moma.moma_modules.prompt.marks import mark_tokens

    conditioning = [[seeded(seed, "positive", (1, length, CONTEXT)), {}]]
    return conditioning if subject is None else mark_tokens(conditioning, {subject.key: tokens})


def negative(length: int = 77, seed: int = 8) -> list:
    """A CONDITIONING that knows nothing of subjects, as stock CLIP Text Encode gives it."""
    return [[seeded(seed, "negative", (1, length, CONTEXT)), {}]]


def sample(
    model: Any,
    positive: list,
    negative: list,
    size: tuple[int, int] = (8, 8),
    batch: int = 1,
    steps: int = 3,
    cfg: float = 7.5,
    sampler: str = "ddim",
    scheduler: str = "ddim_uniform",
    seed: int = 1,
    denoise: float = 1.0,
    **kwargs: Any,
) -> torch.Tensor:
    """What the KSampler node does: [batch, 4, H, W]. Each image of a batch gets the same noise as it would alone."""
    import comfy.sample

    latent = 0.3 * seeded(seed, "latent", (1, 4, *size)).expand(batch, -1, -1, -1) if denoise < 1 else None
    if latent is None:
        latent = torch.zeros(batch, 4, *size)
    noise = torch.cat([seeded(seed + i, "noise", (1, 4, *size)) for i in range(batch)])
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            denoise=denoise,
            seed=seed,
            disable_pbar=True,
            **kwargs,
        )


def run(model: Any, subject: Any, **kwargs: Any) -> torch.Tensor:
    """`sample` with prompts of which the positive one knows the subject."""
    return sample(model, positive(subject), negative(), **kwargs)


def masks_of(model: Any, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """The subject masks of the run that gave `samples`."""
    from comfyui_moma.moma_modules.sampling.patching import settings_of

    (found, *_) = [entry.subject.runs.find(samples) for entry in settings_of(model).subjects]
    assert found is not None
    return found.masks


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether `a` differs from `b` by less than `tolerance`, relative to the norm of `b`. Both must be finite."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).norm() / b.norm()) < tolerance
