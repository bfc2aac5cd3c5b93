"""Several subjects on one model: each with its own tokens, its own mask, its own region, and nothing of the others."""

import logging
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.prompt.marks import TOKENS_KEY, mark_tokens
from comfyui_moma.moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Window
from comfyui_moma.moma_modules.sampling.wrappers import patched
from comfyui_moma.nodes.conditioning import MarkSubject, TextEncode
from comfyui_moma.nodes.patches import ApplyAdapter
from compat_rows import message

from workbench.scene import close, masks_of, moma, negative, positive, sample, tiny_adapter, tiny_shortcut, tiny_subject
from workbench.tiny_models import seeded, tiny_clip

ONE_EVALUATION = {"size": (16, 16), "steps": 2, "last_step": 1}


@pytest.fixture(scope="module")
def cat(adapter: Any) -> Any:
    return tiny_subject(adapter, "cat")


@pytest.fixture(scope="module")
def dog(adapter: Any) -> Any:
    return tiny_subject(adapter, "dog", seed=15)


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_clip()


def half(left: bool) -> torch.Tensor:
    region = torch.zeros(1, 16, 16)
    region[..., slice(0, 8) if left else slice(8, 16)] = 1
    return region


def regional(model: Any, adapter: Any, subject: Any, region: torch.Tensor) -> Any:
    """Both parts of a subject, limited to a region."""
    part = ImageTokens(1.0, Window(region=region))
    with_tokens = patched(
        model,
        (settings_of(model) or settings_of(moma(model, adapter, subject))).with_subject(
            subject, adapter, image_tokens=part
        ),
    )
    return moma(with_tokens, adapter, subject, weight=None, shortcut=tiny_shortcut(region=region))


def prompt(cat: Any, dog: Any, dog_tokens: tuple[int, ...] = (9,)) -> list:
    return mark_tokens(positive(cat), {dog.key: dog_tokens})


def additions(model: Any, block: int = 0) -> dict[str, list[torch.Tensor]]:
    """What MoMA adds in the first block of every forward [R, T, C], per kind of attention."""
    seen: dict[str, list[torch.Tensor]] = {"attn1": [], "attn2": []}
    for kind, added in seen.items():
        slot = model.model_options["transformer_options"]["patches_replace"][kind][("input", 1)]
        original = slot.add_subjects

        def add_subjects(out: Any, *args: Any, original: Any = original, added: Any = added) -> torch.Tensor:
            after = original(out, *args)
            added.append(after - out)
            return after

        slot.add_subjects = add_subjects
    return seen


def test_no_bleeding_between_regions(model: Any, adapter: Any, cat: Any, dog: Any) -> None:
    """With disjoint regions each half gets exactly what its subject alone would add there, and nothing else."""
    both = regional(regional(model, adapter, cat, half(True)), adapter, dog, half(False))
    alone = {"cat": regional(model, adapter, cat, half(True)), "dog": regional(model, adapter, dog, half(False))}
    seen = {name: additions(one) for name, one in {"both": both, **alone}.items()}
    for one in (both, *alone.values()):
        sample(one, prompt(cat, dog), negative(), **ONE_EVALUATION)
    for kind in ("attn1", "attn2"):
        both_added, cat_added, dog_added = (
            seen[name][kind][0].unflatten(1, (16, 16)) for name in ("both", "cat", "dog")
        )
        assert float(cat_added[:, :, 8:].abs().max()) == 0 and float(dog_added[:, :, :8].abs().max()) == 0
        assert float(cat_added[:, :, :8].abs().amax(dim=-1).min()) > 0
        assert close(both_added[:, :, :8], cat_added[:, :, :8], 1e-5)
        assert close(both_added[:, :, 8:], dog_added[:, :, 8:], 1e-5)


def test_a_mask_comes_from_its_own_tokens_alone(model: Any, adapter: Any, cat: Any, dog: Any) -> None:
    both = moma(moma(model, adapter, cat, shortcut=tiny_shortcut()), adapter, dog, shortcut=tiny_shortcut())
    masks = []
    for dog_tokens in ((9,), (12, 13)):
        samples = sample(both, prompt(cat, dog, dog_tokens), negative(), **ONE_EVALUATION)
        masks.append(masks_of(both, samples))
    assert torch.equal(masks[0][cat.key], masks[1][cat.key])
    assert not close(masks[0][dog.key], masks[1][dog.key], 1e-2)
    assert not close(masks[0][dog.key], masks[0][cat.key], 1e-2)


def test_the_order_of_the_subjects_does_not_matter(model: Any, adapter: Any, cat: Any, dog: Any) -> None:
    one, other = (
        moma(moma(model, adapter, a, shortcut=tiny_shortcut()), adapter, b, shortcut=tiny_shortcut())
        for a, b in ((cat, dog), (dog, cat))
    )
    ours = sample(one, prompt(cat, dog), negative(), steps=2)
    assert close(sample(other, prompt(cat, dog), negative(), steps=2), ours, 1e-5)


def test_one_set_of_adapter_weights(model: Any, adapter: Any) -> None:
    chain = model
    for seed, word in enumerate(("cat", "dog", "car")):
        chain = moma(chain, adapter, tiny_subject(adapter, word, seed=70 + seed), shortcut=tiny_shortcut())
    loaded = chain.clone().get_additional_models_with_key("moma")
    assert [patcher.model for patcher in loaded] == [adapter.module]


def test_two_subjects_in_one_text(clip: Any, cat: Any, dog: Any) -> None:
    """MoMA Text Encode for the first, MoMA Mark Subject for the second: one encoding that knows both."""
    encoded, text = TextEncode.execute(clip, cat, "a cat and a dog on a bench", PROMPT_TEMPLATE).args
    marked, again = MarkSubject.execute(clip, dog, encoded, text).args
    assert text == again == "photo of a cat. a cat and a dog on a bench"
    assert torch.equal(marked[0][0], encoded[0][0])
    assert marked[0][1][TOKENS_KEY] == {cat.key: (4, 7), dog.key: (10,)}
    assert dog.key not in encoded[0][1][TOKENS_KEY]


def test_two_subjects_in_one_text_are_told_apart(model: Any, adapter: Any, clip: Any, cat: Any, dog: Any) -> None:
    encoded, text = TextEncode.execute(clip, cat, "a cat and a dog on a bench", PROMPT_TEMPLATE).args
    marked = MarkSubject.execute(clip, dog, encoded, text).args[0]
    both = moma(moma(model, adapter, cat, shortcut=tiny_shortcut()), adapter, dog, shortcut=tiny_shortcut())
    masks = masks_of(both, sample(both, marked, negative(), **ONE_EVALUATION))
    assert not close(masks[cat.key], masks[dog.key], 1e-2)
    unmarked = masks_of(both, sample(both, encoded, negative(), **ONE_EVALUATION))
    assert torch.equal(unmarked[cat.key], masks[cat.key]) and float(unmarked[dog.key].min()) == 1


def test_any_text_encoder_can_be_marked(clip: Any, dog: Any) -> None:
    stock = clip.encode_from_tokens_scheduled(clip.tokenize("a dog"))
    assert MarkSubject.execute(clip, dog, stock, "a dog").args[0][0][1][TOKENS_KEY] == {dog.key: (2,)}
    with pytest.raises(ValueError) as raised:
        MarkSubject.execute(clip, dog, stock, "a dog " * 60)
    assert "text makes 154 tokens, conditioning has 77" in str(raised.value)
    with pytest.raises(ValueError, match="^conditioning is empty: connect that of the MoMA Text Encode"):
        MarkSubject.execute(clip, dog, [], "a dog")


@pytest.mark.parametrize("before", [0, 64, 77])
@pytest.mark.parametrize("behind", [0, 77])
def test_the_text_is_found_in_a_longer_conditioning(clip: Any, dog: Any, before: int, behind: int) -> None:
    """Behind what ELLA or Conditioning Concat put before it, in half precision too, and in every part."""
    stock = clip.encode_from_tokens_scheduled(clip.tokenize("a dog"))[0][0]

    def longer(seed: int) -> torch.Tensor:
        others = seeded(seed, "others", (1, before + behind, stock.shape[2]))
        return torch.cat([others[:, :before], stock, others[:, before:]], dim=1)

    for conditioning in ([[longer(1), {}], [longer(2), {}]], [[longer(1).half(), {}]]):
        marked = MarkSubject.execute(clip, dog, conditioning, "a dog").args[0]
        assert [known[TOKENS_KEY] for _, known in marked] == [{dog.key: (before + 2,)}] * len(conditioning)


def test_a_text_that_is_not_found_is_refused_where_others_are(clip: Any, dog: Any) -> None:
    """With the wrong text: tokens that are not CLIP's are named; a whole number of CLIP's is taken as it is."""
    stock = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))[0][0]
    with pytest.raises(ValueError, match="^conditioning has 141 tokens, which are not CLIP's alone .*ELLA") as raised:
        MarkSubject.execute(clip, dog, [[torch.cat([stock[:, :64], stock], dim=1), {}]], "a dog")
    assert "mark the subject before that node" in str(raised.value)
    twice = [[torch.cat([stock, stock], dim=1), {}]]
    assert MarkSubject.execute(clip, dog, twice, "a dog").args[0][0][1][TOKENS_KEY] == {dog.key: (2,)}


def test_a_prompt_that_knows_nothing_is_said_aloud(
    model: Any, adapter: Any, cat: Any, caplog: pytest.LogCaptureFixture
) -> None:
    full = moma(model, adapter, cat, shortcut=tiny_shortcut())
    with caplog.at_level(logging.WARNING):
        samples = sample(full, positive(), negative(), steps=1)
    assert message("Prompt from another text encoder") in caplog.text
    assert float(masks_of(full, samples)[cat.key].min()) == 1
    caplog.clear()
    sample(full, positive(cat), negative(), steps=1)
    assert "MoMA" not in caplog.text


def test_subjects_of_two_adapters(model: Any, adapter: Any, cat: Any) -> None:
    """Each subject goes through the adapter it was extracted with; another one is refused."""
    other = tiny_adapter(embedding=40)
    with pytest.raises(ValueError, match="subject was extracted with another adapter"):
        ApplyAdapter.execute(model, other, cat, 1.0, 0.0, 1.0)
    dog = tiny_subject(other, "dog", seed=15)
    both = moma(moma(model, adapter, cat), other, dog)
    assert len(both.get_additional_models_with_key("moma")) == 2
    ours = sample(both, prompt(cat, dog), negative(), steps=2)
    assert not close(ours, sample(moma(model, adapter, cat), prompt(cat, dog), negative(), steps=2), 1e-2)
