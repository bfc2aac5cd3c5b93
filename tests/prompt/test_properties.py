"""Properties that hold for any size, mask, word and prompt."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.mllm.encode import IMAGE_TOKEN, prompt_ids
from comfyui_moma.moma_modules.prompt.marks import TOKENS_KEY
from comfyui_moma.moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE, fill_template
from comfyui_moma.moma_modules.prompt.text import encode_prompt, encode_word, plain_text
from comfyui_moma.moma_modules.subject.file import check_prefix, load_subject, save_subject
from comfyui_moma.moma_modules.subject.reference_image import FITS, prepare_references
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from workbench import ROOT
from workbench.scene import masks_of, moma, negative, positive, sample, tiny_shortcut, tiny_subject
from workbench.tiny_models import seeded, tiny_clip, tiny_model

DATA = ROOT / "tests" / "data"
SYNTAX = (
    "(car:1.2)",
    "((stuffed animal))",
    "(stuffed animal:0.5) toy",
    "[car]",
    "embedding:foo",
    "{red|blue} car",
    "{prompt}",
    "{subject}",
    "{0} {",
    "a\\(b\\)",
    "\\1 \\g<0>",
    "car BREAK boat",
    "<lora:x:1>",
    "<image>",
    "</s>",
    "100% %s",
    ")(",
    "((",
    "\N{CAT FACE}\N{ZERO WIDTH JOINER}",
    "stra\N{LATIN SMALL LETTER SHARP S}e \N{CJK UNIFIED IDEOGRAPH-8ECA}",
    "e\N{COMBINING ACUTE ACCENT}",
    "\t\n",
    "\0",
    "word " * 500,
    "x" * 2000,
)
TEXT = st.one_of(st.sampled_from(SYNTAX), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
WORDS = TEXT.filter(lambda text: plain_text(text).strip() != "")
few = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_clip()


@pytest.fixture(scope="module")
def full(adapter: Any) -> Any:
    return moma(tiny_model(), adapter, tiny_subject(adapter), shortcut=tiny_shortcut(start=0.0))


@few
@given(TEXT, WORDS, TEXT)
def test_a_template_is_filled_in_one_pass(template: str, subject: str, prompt: str) -> None:
    text = fill_template(template + PROMPT_TEMPLATE, subject, prompt)
    assert text.endswith(f"photo of a {subject}. {prompt}")
    pieces = template.replace("{prompt}", "{subject}").split("{subject}")
    assert all(piece in text for piece in pieces)


@few
@given(WORDS, TEXT)
def test_the_subject_is_found_inside_the_text_whatever_it_is(clip: Any, adapter: Any, word: str, prompt: str) -> None:
    """An embedding that does not exist, and what CLIP's tokeniser has no token for, cannot be found."""
    subject = replace(tiny_subject(adapter), word=word, prompt=prompt)
    encoded = encode_prompt(clip, subject, prompt, PROMPT_TEMPLATE)
    ((embedding, entry),) = encoded.conditioning
    assert embedding.isfinite().all() and encoded.text == fill_template(PROMPT_TEMPLATE, word, prompt)
    positions = entry[TOKENS_KEY][subject.key]
    length = embedding.shape[1]
    assert all(0 < p < length and p % 77 not in (0, 76) for p in positions) and len(set(positions)) == len(positions)
    assert ("is not among the words of the prompt" in encoded.shown) == (not positions)
    assert encode_word(clip, word).isfinite().all()
    again = encode_prompt(clip, subject, prompt, PROMPT_TEMPLATE).conditioning
    assert torch.equal(again[0][0], embedding) and again[0][1][TOKENS_KEY] == entry[TOKENS_KEY]


@pytest.mark.parametrize(
    ("word", "prompt", "found"),
    [
        ("car", "a (car:1.2) at sea", (4, 7)),
        ("(car:1.2)", "a car at sea", (4, 7)),
        ("(car:1.2)", "a (car:0.8) at sea", (4, 7)),
        ("((car))", "", (4,)),
        ("(stuffed animal:1.2)", "an animal, stuffed", (4, 5, 8, 10)),
        ("stuffed (animal:1.2)", "", (4, 5)),
        ("car \\(red\\)", "", (4, 6)),
        ("car", "{prompt} of a car BREAK car", (4, 11, 13)),
        ("car", "{car|boat}", (4, 7)),
        ("[car]", "", (5,)),
        ("car!", "A car? Yes!", (4, 7)),
    ],
)
def test_emphasis_does_not_hide_the_subject(
    clip: Any, adapter: Any, word: str, prompt: str, found: tuple[int, ...]
) -> None:
    subject = replace(tiny_subject(adapter), word=word)
    encoded = encode_prompt(clip, subject, prompt, PROMPT_TEMPLATE)
    assert encoded.conditioning[0][1][TOKENS_KEY][subject.key] == found
    assert encoded.shown.endswith(f"[subject]: tokens {', '.join(map(str, found))}")


def test_emphasis_still_weighs_in_the_prompt_but_not_in_the_bare_word(clip: Any, adapter: Any) -> None:
    plain, heavy = (replace(tiny_subject(adapter), word=word) for word in ("car", "(car:1.4)"))
    a, b = (encode_prompt(clip, subject, "at sea", PROMPT_TEMPLATE).conditioning[0][0] for subject in (plain, heavy))
    assert not torch.equal(a, b)
    assert torch.equal(encode_word(clip, plain.word), encode_word(clip, heavy.word))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a (red:1.2) car", "a red car"),
        ("((a)) b", "a b"),
        ("\\(1\\)", "(1)"),
        ("(a (b:1.1) c:0.5)", "a b c"),
        ("no :1.2 (", "no :1.2 ("),
        ("{a|b} [c]", "{a|b} [c]"),
    ],
)
def test_what_the_mllm_reads(text: str, plain: str) -> None:
    assert plain_text(text) == plain


@few
@given(WORDS, TEXT)
def test_the_instruction_holds_one_picture(word: str, prompt: str) -> None:
    path = DATA / "mllm" / "tiny56" / "checkpoint" / "tokenizer.model"
    tokenizer = SentencePieceProcessor(model_proto=path.read_bytes())
    ids = prompt_ids(tokenizer, word, prompt)
    assert ids[0] == tokenizer.bos_id() and ids.count(IMAGE_TOKEN) == 1
    rest = [i for i in ids[1:] if i != IMAGE_TOKEN]
    assert all(0 <= i < tokenizer.vocab_size() for i in rest)
    assert tokenizer.bos_id() not in rest and tokenizer.eos_id() not in rest
    assert prompt_ids(tokenizer, word, prompt) == ids


SIDES = st.integers(1, 90)


@few
@given(
    size=st.tuples(st.integers(1, 2), SIDES, SIDES, st.integers(1, 4)),
    mask_size=st.none() | st.tuples(SIDES, SIDES),
    spot=st.floats(0, 1),
    level=st.floats(0.1, 1),
    fit=st.sampled_from(FITS),
    seed=st.integers(0, 9),
)
def test_any_picture_and_mask_make_a_reference(
    size: tuple[int, ...], mask_size: tuple[int, int] | None, spot: float, level: float, fit: str, seed: int
) -> None:
    image = torch.rand(size, generator=torch.Generator().manual_seed(seed)).clamp(min=0.05)
    mask = None
    if mask_size is not None:
        mask = torch.zeros(size[0], *mask_size)
        mask[..., int(spot * (mask_size[1] - 1)) :] = level
    found = prepare_references(image, mask, fit)
    assert found.images.shape == (size[0], 512, 512, 3) and found.images.dtype == torch.uint8
    assert found.masks.shape == (size[0], 512, 512) and found.masks.dtype == torch.bool
    assert found.masks.flatten(1).any(dim=1).all()
    again = prepare_references(image, mask, fit)
    assert torch.equal(again.images, found.images) and torch.equal(again.masks, found.masks)


@few
@given(WORDS, TEXT, st.integers(0, 99))
def test_a_saved_subject_comes_back_the_same(adapter: Any, word: str, prompt: str, seed: int) -> None:
    whole = tiny_subject(adapter)
    masks = torch.zeros(1, 512, 512, dtype=torch.bool)
    masks[:, seed, 99 - seed :] = True
    images = torch.full((1, 512, 512, 3), seed, dtype=torch.uint8)
    subject = replace(whole, word=word, prompt=prompt, masks=masks, images=images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        save_subject(subject, path)
        loaded = load_subject(path)
    assert (loaded.word, loaded.prompt, loaded.key) == (word, prompt, subject.key)
    assert torch.equal(loaded.masks, masks) and torch.equal(loaded.images, images)


@few
@given(st.text(max_size=60))
def test_a_prefix_is_accepted_or_refused_by_name(prefix: str) -> None:
    try:
        check_prefix(prefix)
    except ValueError as error:
        assert str(error).startswith("filename_prefix ")
    else:
        name = prefix.strip().replace("\\", "/")
        assert name and not name.startswith("/") and ".." not in name.split("/")
        assert not set(name) & set('<>:"|?*\0')


REGIONS = st.none() | st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    # Three wide at least: in the tiny UNet group norm would be left with one value.
    size=st.tuples(st.integers(1, 13), st.integers(3, 13)),
    batch=st.integers(1, 3),
    region=REGIONS,
    cfg=st.sampled_from([1.0, 7.5]),
    weight=st.floats(0, 3),
    length=st.sampled_from([77, 154]),
)
def test_any_latent_size_and_batch(
    full: Any,
    adapter: Any,
    size: tuple[int, int],
    batch: int,
    region: tuple[int, ...] | None,
    cfg: float,
    weight: float,
    length: int,
) -> None:
    subject = tiny_subject(adapter)
    area = None if region is None else seeded(3, "region", region).clamp(0, 1)
    patched = moma(full, adapter, subject, weight, tiny_shortcut(strength=weight / 2, region=area, start=0.0))

    def run() -> torch.Tensor:
        return sample(patched, positive(subject, length), negative(), size=size, batch=batch, cfg=cfg, steps=2)

    samples = run()
    assert samples.shape == (batch, 4, *size) and samples.isfinite().all()
    (mask,) = masks_of(patched, samples).values()
    assert mask.shape == (batch, *size) and float(mask.min()) >= 0 and float(mask.max()) <= 1
    assert torch.equal(run(), samples)
