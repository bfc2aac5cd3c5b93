"""Where the subject is in a prompt: its tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfyui_moma.moma_modules.prompt.clip_tokens import Piece, bracketed, read_pieces
from comfyui_moma.moma_modules.prompt.marks import TOKENS_KEY
from comfyui_moma.moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE, bare, fill_template, find_subject
from comfyui_moma.moma_modules.prompt.text import encode_prompt, encode_word, plain_text
from comfyui_moma.nodes.conditioning import TextEncode
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from workbench import ROOT
from workbench.scene import tiny_adapter, tiny_subject
from workbench.tiny_models import tiny_clip

GOLDEN = ROOT / "tests" / "data" / "golden"
TOKENIZER = SD1Tokenizer()


@pytest.fixture(scope="module")
def clip() -> Any:
    return tiny_clip()


def positions(text: str, subject: str) -> tuple[int, ...]:
    return find_subject(pieces(text), [pieces(bare(word)) for word in subject.split()])


def pieces(text: str, tokenizer: SD1Tokenizer = TOKENIZER) -> list[Piece]:
    tokens = tokenizer.tokenize_with_weights(text)["l"]
    return read_pieces(tokens, lambda token: tokenizer.untokenize([(token, 1.0)])[0][1], plain_text(text))


@pytest.mark.parametrize("name", ["tiny_context", "tiny_texture"])
def test_positions_of_the_recorded_runs(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    text = fill_template(PROMPT_TEMPLATE, case["subject"], case["prompt"])
    assert positions(text, case["subject"]) == tuple(case["subject_token_idx"])


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("a car and a car", "car", (2, 5)),
        ("a carpet", "car", ()),
        ("a (car:1.3) at sea", "car", (2,)),
        ("a stuffed dog, stuffed", "stuffed dog", (2, 3, 5)),
        ("word " * 80 + "car", "car", (77 + 80 - 75 + 1,)),
        ("", "car", ()),
    ],
)
def test_positions(text: str, subject: str, expected: tuple[int, ...]) -> None:
    assert positions(text, subject) == expected


def test_a_word_of_several_tokens() -> None:
    count = len([t for t, *_ in TOKENIZER.tokenize_with_weights("axolotl")["l"][0] if t not in (49406, 49407)])
    assert count > 1 and positions("an axolotl swims", "axolotl") == tuple(range(2, 2 + count))


NO_WIDTH = {0x200B: None, 0x200D: None}
SHOWN = {
    "accents": ("pokémon", "poke\u0301mon's", "photo of a [pokémon]. [pokémon]'s"),
    "emoji": ("😀", "😀😀 and 😀! x", "photo of a [😀]. [😀😀] and [😀]! x"),
    "joined emoji": ("👩\u200d🚀", "👩\u200d🚀!", "photo of a [👩\u200d][🚀]. [👩\u200d][🚀]!"),
    "variation selector": ("❤", "❤️. ❤", "photo of a [❤]. [❤️.] [❤]"),
    "plus": ("C++", "c++! vitamin C", "photo of a [c][+][+.] [c][++]! vitamin c"),
    "sharp": ("C#", "C#, C", "photo of a [c][#]. [c][#], c"),
    "currency": ("$", "100$ bill", "photo of a [$.] 100[$] bill"),
    "trade mark": ("Lego™", "A lego™ car.", "photo of a [lego][™]. a [lego][™] car."),
    "hyphens": ("3-in-1", "a 3-in-1.", "photo of a [3][-][in][-][1]. a [3][-][in][-][1]."),
    "apostrophe": ("cat's", "the cat's.", "photo of a [cat]['s]. the [cat]['s]."),
    "quotes": ("“cup”", "A «cup».", "photo of a “[cup]”. a «[cup]»."),
    "exclamation": ("café!", "A café?", "photo of a [café]!. a [café]?"),
    "no-break space": ("stuffed\u00a0dog", "a dog", "photo of a [stuffed] [dog]. a [dog]"),
    "zero width": ("cup\u200b", "A cup", "photo of a [cup]\u200b. a [cup]"),
    "full width": (
        "\uff23\uff21\uff32",
        "\uff43\uff41\uff52 car",
        "photo of a [\uff43][\uff41][\uff52]. [\uff43][\uff41][\uff52] car",
    ),
    "Chinese": ("猫", "白猫在海滩上", "photo of a [猫]. 白[猫]在海滩上"),
    "Thai": ("เสือ", "เสือ", "photo of a [เส][ื][อ]. [เส][ื][อ]"),
    "Hebrew": ("כלב", "כֶּלֶב כלב!", "photo of a [כ][ל][ב]. כֶּלֶב [כ][ל][ב]!"),
    "emphasis": ("😀", "a (😀:1.2). ok", "photo of a [😀]. a [😀]. ok"),
    "marks only": ("!", "x!", "photo of a [!.] x[!]"),
    "slash": ("AC/DC", "AC/DC.", "photo of a [ac][/][dc]. [ac][/][dc]."),
}


@pytest.mark.parametrize("case", SHOWN)
def test_any_word_is_found_and_shown_as_people_write_it(clip: Any, case: str) -> None:
    """CLIP's tokenizer joins symbols with a full stop, and cuts other scripts' characters into bytes."""
    word, prompt, shown = SHOWN[case]
    encoded = encode_prompt(clip, replace(tiny_subject(tiny_adapter()), word=word), prompt, PROMPT_TEMPLATE)
    # transformers 4 leaves out what has no width.
    assert encoded.shown.split("\n")[0].translate(NO_WIDTH) == shown.translate(NO_WIDTH)


def test_tokens_that_hold_a_part_of_the_word_count(clip: Any) -> None:
    """Of "100$.", the last token is CLIP's for "$."; of 白猫, those with a byte of 猫."""
    subject = replace(tiny_subject(tiny_adapter()), word="$ 猫")
    (entry,) = encode_prompt(clip, subject, "100$. 白猫", "{prompt}").conditioning
    assert entry[1][TOKENS_KEY][subject.key] == (4, 8, 9, 10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["C"], exclude_characters="()\\"), min_size=1, max_size=6),
    st.sampled_from(["photo of a {}. x", "a {}, {}!", "“{}”", "({}:1.2)"]),
)
def test_what_is_written_into_a_text_is_found_in_it(word: str, template: str) -> None:
    plain = " ".join(word.split())
    assert not plain or positions(template.replace("{}", plain), plain)


def test_a_words_occurrences_are_words() -> None:
    assert positions("carpets and scars", "car") == () and positions("c + +", "++") == ()
    assert positions("e\u0301te\u0301", "t") == () and positions("c++", "+") == (2,)


def test_an_embedding_as_the_subject_is_found_before_a_full_stop(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "mine.safetensors")
    tokenizer = SD1Tokenizer(embedding_directory=str(tmp_path))
    text = fill_template(PROMPT_TEMPLATE, "embedding:mine", "A embedding:mine at sea.")
    assert text == "photo of a embedding:mine . A embedding:mine at sea."
    found = find_subject(pieces(text, tokenizer), [pieces("embedding:mine", tokenizer)])
    assert found == (4, 5, 8, 9)
    assert bracketed(pieces(text, tokenizer), found).startswith("photo of a [(embedding)] [(embedding)] .")


def test_a_missing_word_is_told_as_people_write_it(clip: Any, caplog: pytest.LogCaptureFixture) -> None:
    subject = replace(tiny_subject(tiny_adapter()), word="👩\u200d🚀 pokémon")
    (shown,) = TextEncode.execute(clip, subject, "A\nböat.", "{prompt}").ui.as_dict()["text"]
    assert "the subject '👩\u200d🚀 pokémon' is not among the words of the prompt 'A böat.'" in shown
    assert shown in caplog.text


@pytest.mark.parametrize("name", ["prompt", "template"])
def test_half_a_character_is_refused_by_name(clip: Any, name: str) -> None:
    texts = {"prompt": "A car", "template": "{prompt}"}
    texts[name] += " \udc00"
    with pytest.raises(ValueError, match=rf"^{name} holds half a character \('\\udc00'.* Write it again"):
        encode_prompt(clip, tiny_subject(tiny_adapter()), **texts)


def test_other_braces_in_a_template_stay() -> None:
    assert fill_template("{a|b} {subject}: {prompt}", "cup", "{prompt}") == "{a|b} cup: {prompt}"


def test_a_prompt_knows_its_subject(clip: Any) -> None:
    subject = tiny_subject(tiny_adapter())
    encoded = encode_prompt(clip, subject, "A car at sea.", PROMPT_TEMPLATE)
    assert encoded.text == "photo of a car. A car at sea."
    assert encoded.shown == "photo of a [car]. a [car] at sea.\n[subject]: tokens 4, 7"
    assert encoded.conditioning[0][0].shape == (1, 77, 64)
    assert encoded.conditioning[0][1][TOKENS_KEY] == {subject.key: (4, 7)}
    encoded = encode_prompt(clip, subject, "A boat.", "{prompt}")
    assert encoded.conditioning[0][1][TOKENS_KEY] == {subject.key: ()}
    assert "'car' is not among the words of the prompt 'A boat.'" in encoded.shown


def test_the_word_alone_is_encoded_for_the_reference_pass(clip: Any) -> None:
    assert encode_word(clip, "car").shape == (1, 77, 64)
    assert not torch.equal(encode_word(clip, "car"), encode_word(clip, "dog"))
