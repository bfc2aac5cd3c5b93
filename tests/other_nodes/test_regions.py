"""Regional prompting: several prompts with areas, masks and timestep ranges, each knowing its subject's tokens."""

from typing import Any

import torch
from comfyui_moma.moma_modules.sampling.patching import settings_of
from comfyui_moma.moma_modules.sampling.settings import ImageTokens, Window
from comfyui_moma.moma_modules.sampling.wrappers import patched

import nodes
from workbench.scene import WORD_TOKENS, close, masks_of, negative, positive, sample, tiny_shortcut

SIZE = (16, 16)
ONE_EVALUATION = {"size": SIZE, "steps": 2, "last_step": 1}
LEFT, RIGHT = slice(0, 8), slice(8, 16)


def area(conditioning: list, x: int) -> list:
    """Conditioning (Set Area) to a half; x in latent pixels."""
    return nodes.ConditioningSetArea().append(conditioning, 64, 128, 8 * x, 0, 1.0)[0]


def combine(*conditionings: list) -> list:
    return [entry for conditioning in conditionings for entry in conditioning]


def rows_seen(full: Any) -> list[Any]:
    """The `Rows` of every forward, and the size of its latent."""
    seen: list[Any] = []
    slot = full.model_options["transformer_options"]["patches_replace"]["attn2"][("input", 1)]
    original = slot.add_subjects

    def add_subjects(out: Any, q: Any, k: Any, forward: Any, extra_options: Any) -> torch.Tensor:
        seen.append((forward.rows, forward.size))
        return original(out, q, k, forward, extra_options)

    slot.add_subjects = add_subjects
    return seen


def mask(full: Any, subject: Any, plus: list, **kwargs: Any) -> torch.Tensor:
    samples = sample(full, plus, negative(), **{**ONE_EVALUATION, **kwargs})
    assert samples.isfinite().all()
    return masks_of(full, samples)[subject.key][0]


def test_set_area(full: Any, subject: Any) -> None:
    """The forward of an area sees the pixels of that area; a subject named there alone has its mask there alone."""
    seen = rows_seen(full)
    plus = combine(area(positive(subject), 8), area(positive(seed=21), 0))
    found = mask(full, subject, plus)
    canvas = torch.arange(256).view(16, 16)
    known = [rows for rows, _ in seen if bool((rows.tokens.sum() > 0) & (rows.positive == 1).any())]
    assert (16, 8) in {size for _, size in seen}
    for rows in known:
        for row in range(len(rows.positive)):
            if rows.positive[row] and rows.tokens[row].sum() > 0:
                assert torch.equal(rows.pixels[row, 0], canvas[:, RIGHT])
                assert rows.tokens[row, 0].nonzero().flatten().tolist() == list(WORD_TOKENS)
    assert known and float(found[:, LEFT].max()) == 0 and float(found[:, RIGHT].std()) > 0.05


def test_two_areas_are_two_halves_of_one_mask(full: Any, subject: Any) -> None:
    found = mask(full, subject, combine(area(positive(subject), 0), area(positive(subject, seed=21), 8)))
    assert float(found[:, LEFT].std()) > 0.05 and float(found[:, RIGHT].std()) > 0.05


def test_set_mask(full: Any, adapter: Any, subject: Any) -> None:
    """The subject acts where its prompt applies, as with a region_mask there; it is still looked for everywhere."""
    region = torch.zeros(1, 128, 128)
    region[..., :64] = 1
    set_mask = nodes.ConditioningSetMask().append
    inside = set_mask(positive(subject), region, "default", 1.0)[0]
    outside = set_mask(positive(seed=21), 1 - region, "default", 1.0)[0]
    window = Window(start=0.0, region=region)
    settings = settings_of(full).with_subject(
        subject, adapter, image_tokens=ImageTokens(1.0, window), shortcut=tiny_shortcut(region=region)
    )
    found = mask(full, subject, combine(inside, outside))
    assert torch.allclose(found, mask(patched(full, settings), subject, positive(subject)), atol=1e-5)
    assert float(found[:, RIGHT].max()) > 0
    bounded = set_mask(positive(subject), region, "mask bounds", 1.0)[0]
    limited = mask(full, subject, combine(bounded, positive(seed=21)))
    assert float(limited[:, RIGHT].max()) == 0 and float(limited[:, LEFT].std()) > 0.05


def test_the_other_prompts_get_nothing_of_the_subject_outside_its_mask(full: Any, model: Any, subject: Any) -> None:
    """A prompt without the subject and everywhere, one with it and masked to nothing: the plain picture, exactly."""
    nothing = nodes.ConditioningSetMask().append(positive(subject), torch.zeros(1, 128, 128), "default", 1.0)[0]
    plus = combine(nothing, positive(seed=21))
    options = {"size": SIZE, "steps": 3}
    assert torch.equal(sample(full, plus, negative(), **options), sample(model, plus, negative(), **options))


def test_combine_takes_the_mask_from_the_prompts_that_know(full: Any, subject: Any) -> None:
    """Two positives: the one without the subject does not water the mask down; two with it are averaged."""
    alone = mask(full, subject, positive(subject))
    mixed = mask(full, subject, combine(positive(subject), positive(seed=21)))
    assert torch.allclose(mixed, alone, atol=1e-5)
    both = mask(full, subject, combine(positive(subject), positive(subject, seed=21, tokens=(9,))))
    assert not close(both, alone, 1e-2)


def test_concat_keeps_the_tokens_of_conditioning_to(full: Any, subject: Any) -> None:
    """The longer text has the subject at the same places. What is known of conditioning_from is lost by that node."""
    concat = nodes.ConditioningConcat().concat
    seen = rows_seen(full)
    found = mask(full, subject, concat(positive(subject), positive(seed=21))[0])
    tokens = next(rows.tokens[rows.positive == 1][0, 0] for rows, _ in seen)
    assert len(tokens) == 154 and tokens.nonzero().flatten().tolist() == list(WORD_TOKENS)
    assert float(found.std()) > 0.05
    assert float(mask(full, subject, concat(positive(seed=21), positive(subject))[0]).min()) == 1


def test_timestep_ranges(full: Any, model: Any, subject: Any) -> None:
    """A prompt without the subject at the start, one with it later: no mask until then, and the last one stays."""
    set_range = nodes.ConditioningSetTimestepRange().set_range
    plus = combine(set_range(positive(seed=21), 0.0, 0.5)[0], set_range(positive(subject), 0.5, 1.0)[0])
    options = {"size": SIZE, "steps": 4, "sampler": "euler", "scheduler": "normal"}
    early = sample(full, plus, negative(), **options, last_step=1)
    assert float(masks_of(full, early)[subject.key].min()) == 1
    whole = sample(full, plus, negative(), **options)
    assert float(masks_of(full, whole)[subject.key].std()) > 0.05
    assert not close(whole, sample(model, plus, negative(), **options), 1e-2)
    swapped = combine(set_range(positive(subject), 0.0, 0.5)[0], set_range(positive(seed=21), 0.5, 1.0)[0])
    first, all_steps = (sample(full, swapped, negative(), **options, last_step=last) for last in (2, 4))
    assert torch.equal(masks_of(full, first)[subject.key], masks_of(full, all_steps)[subject.key])
