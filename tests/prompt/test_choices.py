"""Choices in prompts, {a|b}: one for a run, the same in word, prompt and encoded text."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.moma_modules.prompt.choices import choose, fingerprint, has_choice
from comfyui_moma.nodes.conditioning import MarkSubject, TextEncode
from comfyui_moma.nodes.extract import ExtractSubject

from workbench import ROOT
from workbench.scene import tiny_subject
from workbench.tiny_models import tiny_clip

pytestmark = pytest.mark.newest

DRAWS = [str(number) for number in range(200)]


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_clip()


@pytest.fixture(scope="module")
def mllm() -> Any:
    return load_mllm(ROOT / "tests" / "data" / "mllm" / "tiny56" / "checkpoint", vision_heads=4)


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("a {red|blue} car", {"a red car", "a blue car"}),
        ("a {red|{dark|light} blue|} car", {"a red car", "a dark blue car", "a light blue car", "a  car"}),
        ("{a|b}{a|b}", {"aa", "bb"}),
        ("{a|b}{b|a}", {"ab", "aa", "bb", "ba"}),
        ("{a {x}|b}", {"a {x}", "b"}),
        ("{subject} {} {a", {"{subject} {} {a"}),
        ("{a|b", {"{a|b"}),
        ("a|b} {", {"a|b} {"}),
        (r"\{a|b\} {c\|d|e}", {"{a|b} c|d", "{a|b} e"}),
        (r"\(a\) \\{a|b}", {r"\(a\) \\a", r"\(a\) \\b"}),
        ("{{a|b}|c}", {"a", "b", "c"}),
        ("{猫|🐕 {x|y}}", {"猫", "🐕 x", "🐕 y"}),
        ("", {""}),
    ],
)
def test_each_option_comes_up(text: str, results: set[str]) -> None:
    assert {choose(text, draw) for draw in DRAWS} == results
    assert choose(text, "x") == choose(text, "x")


def test_a_text_with_a_choice_runs_anew_each_time() -> None:
    assert has_choice("a", None, "{b|c}") and not has_choice("{subject}", None, r"\{a|b\}")
    assert fingerprint("{a|b}") != fingerprint("{a|b}") and fingerprint("a", None) == fingerprint("a", None) == ""
    texts = {"subject": "cup", "prompt": "A cup."}
    others = {"mllm": None, "adapter": None, "image": None, "fit": "squash", "cache": True}
    asked = [ExtractSubject.fingerprint_inputs(**others, **{**texts, "prompt": "{a|b}"}) for _ in range(2)]
    assert asked[0] != asked[1] and ExtractSubject.fingerprint_inputs(**others, **texts) == ""
    asked = [TextEncode.fingerprint_inputs(clip=None, prompt=None, template="{a|b}") for _ in range(2)]
    assert asked[0] != asked[1] and TextEncode.fingerprint_inputs(prompt="a", template="b") == ""


def test_word_prompt_and_encoded_text_agree(mllm: Any, adapter: Any, clip: Any) -> None:
    """Whether the prompt is written once, or again at MoMA Text Encode."""
    image = torch.rand(1, 40, 30, 3, generator=torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(20):
        with torch.inference_mode():
            (made,) = ExtractSubject.execute(
                mllm, adapter, image, "{cup|mug}", "A {cup|mug} in {snow|rain}.", "squash"
            ).args
        assert made.prompt in {f"A {made.word} in snow.", f"A {made.word} in rain."}
        for prompt in ("", "A {cup|mug} in {snow|rain}."):
            encoded = TextEncode.execute(clip, made, prompt, "{photo|photo} of a {subject}. {prompt}")
            assert encoded.args[1] == f"photo of a {made.word}. {made.prompt}"
        seen.add(made.prompt)
    assert len(seen) > 1


def test_a_subject_without_choices_leaves_them_to_the_run(clip: Any, adapter: Any) -> None:
    subject = tiny_subject(adapter)
    texts = {TextEncode.execute(clip, subject, "{a|b|c|d}", "{prompt}").args[1] for _ in range(200)}
    assert texts == {"a", "b", "c", "d"}
    drawn = replace(subject, draw="7")
    assert len({TextEncode.execute(clip, drawn, "{a|b|c|d}", "{prompt}").args[1] for _ in range(9)}) == 1


def test_a_choice_that_another_node_made_is_a_warning(
    clip: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a red car"))
    MarkSubject.execute(clip, tiny_subject(adapter), conditioning, "a {red|blue} car")
    assert "MoMA Mark Subject holds a choice {a|b}, and the node that encoded it took one of its own" in caplog.text
    caplog.clear()
    MarkSubject.execute(clip, tiny_subject(adapter), conditioning, "a red car")
    assert caplog.text == ""
