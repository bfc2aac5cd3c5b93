"""Several references of one subject, and reference passes kept from run to run."""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management
import pytest
import torch
from comfyui_moma.moma_modules.sampling.caches import caches_of
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.reference import encode_reference
from comfyui_moma.moma_modules.subject.subject import combine_subjects
from comfyui_moma.nodes.patches import SelfAttnShortcut

from workbench.scene import CONTEXT, moma, negative, positive, sample, tiny_adapter, tiny_shortcut, tiny_subject
from workbench.tiny_models import seeded, tiny_clip, tiny_model, tiny_vae

LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k"
LORA_KEY = f"{LAYER}.weight"


@pytest.fixture
def adapter() -> Any:
    """One of its own for each test: the cache is the adapter's."""
    return tiny_adapter()


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """The number of rows of every UNet forward in the block."""
    rows: list[int] = []
    handle = model.model.diffusion_model.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def run(patched: Any, subject: Any, seed: int = 1) -> torch.Tensor:
    return sample(patched, positive(subject), negative(), steps=2, seed=seed)


def with_lora(model: Any, strength: float = 1.0) -> Any:
    lora = model.clone()
    lora.add_patches({LORA_KEY: ("diff", (torch.ones(model.model_state_dict()[LORA_KEY].shape),))}, strength)
    return lora


def with_object_patch(model: Any) -> Any:
    """With another layer in the place of one, as some packs do; ComfyUI counts that as no change of the weights."""
    other = model.clone()
    layer = copy.deepcopy(model.get_model_object(LAYER))
    layer.weight.data += 1
    other.add_object_patch(LAYER, layer)
    return other


def with_attention(model: Any) -> Any:
    """With another attention function, as some packs do."""
    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args, **kwargs: (
        0.5 * function(*args, **kwargs)
    )
    return other


def test_the_reference_pass_is_not_repeated_for_another_seed_or_strength(model: Any, adapter: Any) -> None:
    subject = tiny_subject(adapter)
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    with forwards(model) as rows:
        first = run(patched, subject)
        assert rows == [1, 2, 2]
        rows.clear()
        assert torch.equal(run(patched, subject), first)
        run(patched, subject, seed=2)
        run(moma(model, adapter, subject, shortcut=tiny_shortcut(strength=0.4)), subject)
        assert rows == [2] * 6
    fresh = tiny_adapter()
    assert torch.equal(run(moma(model, fresh, subject, shortcut=tiny_shortcut()), subject), first)


def test_whatever_the_reference_pass_depends_on_repeats_it(model: Any, adapter: Any) -> None:
    subject, shortcut = tiny_subject(adapter), tiny_shortcut()
    run(moma(model, adapter, subject, shortcut=shortcut), subject)
    masked = replace(subject, masks=~subject.masks)
    changed = {
        "mask": (model, masked, shortcut),
        "reference": (model, subject, replace(shortcut, latent=shortcut.latent + 1)),
        "text": (model, subject, replace(shortcut, text=shortcut.text + 1)),
        "seed": (model, subject, replace(shortcut, noise=shortcut.noise + 1)),
        "LoRA": (with_lora(model), subject, shortcut),
        "layer": (with_object_patch(model), subject, shortcut),
        "another layer": (with_object_patch(model), subject, shortcut),
        "attention": (with_attention(model), subject, shortcut),
        "another attention": (with_attention(model), subject, shortcut),
        "another checkpoint": (tiny_model(), subject, shortcut),
    }
    for name, (other, who, how) in changed.items():
        patched = moma(other, adapter, who, shortcut=how)
        with forwards(other) as rows:
            ours = run(patched, who)
            assert rows == [1, 2, 2], name
        fresh = moma(other, tiny_adapter(), who, shortcut=how)
        assert torch.equal(ours, run(fresh, who)), name
    # A LoRA that comes after our nodes counts as well.
    late = with_lora(moma(model, adapter, subject, shortcut=shortcut))
    with forwards(model) as rows:
        run(late, subject)
        assert rows == [1, 2, 2]


def test_an_interrupted_reference_pass_is_not_kept(model: Any, adapter: Any) -> None:
    subject = tiny_subject(adapter)
    patched = moma(model, adapter, subject, shortcut=tiny_shortcut())
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(patched, subject)
    with forwards(model) as rows:
        run(patched, subject)
    assert rows == [1, 2, 2]


def test_the_cache_is_bounded(model: Any, adapter: Any) -> None:
    caches_of(adapter).references.capacity = 1
    one, two = tiny_subject(adapter), tiny_subject(adapter, seed=9)
    two = replace(two, masks=~two.masks)
    patched = {id(s): moma(model, adapter, s, shortcut=tiny_shortcut()) for s in (one, two)}
    with forwards(model) as rows:
        for subject in (one, two, two, one):
            run(patched[id(subject)], subject)
    assert rows.count(1) == 3


@contextmanager
def encodings(vae: Any, clip: Any) -> Iterator[list[str]]:
    """What was encoded in the block: "picture" for one through the VAE, "text" for one through CLIP."""
    seen: list[str] = []
    hooks = [
        vae.first_stage_model.taesd_encoder.register_forward_hook(lambda *_: seen.append("picture")),
        clip.cond_stage_model.clip_l.transformer.register_forward_hook(lambda *_: seen.append("text")),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_the_reference_is_encoded_once_for_all_strengths(model: Any, adapter: Any) -> None:
    """Until VAE, CLIP, pictures or word are others; then the result is that of an adapter that saw nothing before."""
    vae, clip = tiny_vae(), tiny_clip()
    subject = tiny_subject(adapter)

    def shortcut(vae: Any, clip: Any, subject: Any, adapter: Any = adapter, strength: float = 1.0) -> Any:
        (patched,) = SelfAttnShortcut.execute(model, adapter, subject, vae, clip, strength, 0.05, 1.0, 0).args
        return settings_of(patched).subjects[0].shortcut

    with encodings(vae, clip) as seen:
        first = shortcut(vae, clip, subject)
        assert sorted(seen) == ["picture", "text"]
        another = replace(subject, embedding=subject.embedding + 1)  # as for another prompt
        for who, strength in ((subject, 0.4), (another, 1.0)):
            again = shortcut(vae, clip, who, strength=strength)
            assert torch.equal(again.latent, first.latent) and torch.equal(again.text, first.text)
            assert again.strength == strength
        assert sorted(seen) == ["picture", "text"]
    patched_clip = clip.clone()
    changed = {
        "pictures": (vae, clip, replace(subject, images=255 - subject.images), ["picture"]),
        "word": (vae, clip, replace(subject, word="dog"), ["text"]),
        "CLIP": (vae, patched_clip, subject, ["text"]),
        "VAE": (tiny_vae(scale=0.9), patched_clip, subject, ["picture"]),
    }
    for name, (vae_now, clip_now, who, again) in changed.items():
        with encodings(vae_now, clip_now) as seen:
            now = shortcut(vae_now, clip_now, who)
            assert seen == again, name
        fresh = shortcut(vae_now, clip_now, who, tiny_adapter())
        assert torch.equal(now.latent, fresh.latent) and torch.equal(now.text, fresh.text), name
        assert torch.equal(now.latent, first.latent) == (name in ("CLIP", "word")), name
        assert torch.equal(now.text, first.text) == (name != "word"), name


def test_kept_encodings_are_bounded_and_keep_no_vae(adapter: Any) -> None:
    vae, clip = tiny_vae(), tiny_clip()
    kept = caches_of(adapter)
    kept.pictures.capacity = 2 * 4 * 8 * 8 * 4  # two latents [1, 4, 8, 8] in float32
    one, two, three = (tiny_subject(adapter, seed=seed) for seed in (1, 2, 3))
    with encodings(vae, clip) as seen:
        for subject in (one, two, one, three, one, two):
            encode_reference(adapter, subject, vae, clip)
    assert seen.count("picture") == 4
    gone = weakref.ref(vae)
    del vae
    gc.collect()
    assert gone() is None


def test_combined_subjects_hold_all_references_and_the_mean_embedding(adapter: Any) -> None:
    a, b, c = (tiny_subject(adapter, seed=seed) for seed in (1, 2, 3))
    all_three = combine_subjects(combine_subjects(a, b), c)
    assert torch.equal(all_three.images, torch.cat([a.images, b.images, c.images]))
    assert torch.equal(all_three.masks, torch.cat([a.masks, b.masks, c.masks]))
    assert torch.allclose(all_three.embedding, (a.embedding + b.embedding + c.embedding) / 3)
    assert len({s.key for s in (a, b, c, all_three)}) == 4


def test_different_subjects_are_not_combined(adapter: Any) -> None:
    subject = tiny_subject(adapter)
    with pytest.raises(ValueError, match=r"^subject_b cannot be combined.*subject word is 'dog' there and 'car' here"):
        combine_subjects(subject, tiny_subject(adapter, "dog"))
    with pytest.raises(ValueError, match=r"the adapter is 'other' there"):
        combine_subjects(subject, replace(subject, adapter_identity="other"))


def test_the_shortcut_looks_at_the_union_of_the_references(model: Any, adapter: Any) -> None:
    """Each reference is one pass of one row; what each layer attends to is their tokens side by side."""
    a, b = tiny_subject(adapter), tiny_subject(adapter, seed=9)
    both = combine_subjects(a, b)
    latents = [seeded(i, "reference", (1, 4, 8, 8)) for i in (1, 2)]
    parts = [replace(tiny_shortcut(), latent=latent) for latent in latents]
    joined = replace(parts[0], latent=torch.cat(latents), noise=torch.cat([part.noise for part in parts]))
    seen: list[Any] = []
    for subject, shortcut in ((a, parts[0]), (b, parts[1]), (both, joined)):
        patched = moma(model, adapter, subject, weight=None, shortcut=shortcut)
        _watch_keys(patched, seen)
        with forwards(model) as rows:
            sample(patched, positive(subject), negative(), steps=1)
        assert rows == [1] * len(shortcut.latent) + [2]
    for kind in range(2):
        assert torch.equal(seen[2][kind], torch.cat([seen[0][kind], seen[1][kind]], dim=1))


def _watch_keys(patched: Any, seen: list[Any]) -> None:
    patch = patched.model_options["transformer_options"]["patches_replace"]["attn1"][("input", 1)]
    original = patch.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> Any:
        seen.append(forward.subjects[0].reference[0])
        return original(out, q, k, forward, extra_options)

    patch.add_subjects = add_subjects


def test_text_of_other_length_is_fine(model: Any, adapter: Any) -> None:
    """A subject of over 77 tokens' text makes the reference pass longer, and works."""
    subject = tiny_subject(adapter)
    long = replace(tiny_shortcut(), text=seeded(6, "long", (1, 154, CONTEXT)))
    assert run(moma(model, adapter, subject, shortcut=long), subject).isfinite().all()
