"""Encoding text with a CLIP, and knowing where in it the subject is."""

from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor

from ..subject.subject import Subject
from .clip_tokens import Piece, bracketed, read_pieces
from .marks import mark_tokens, moved_tokens
from .subject_tokens import bare, fill_template, find_subject

CLIP_KEY = "l"
"""ComfyUI's name for the one text encoder of SD1.5."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A positive prompt, encoded.

    Attributes:
        conditioning: The CONDITIONING; it knows where the subject's tokens are.
        text: The full text.
        shown: The tokens as CLIP reads them, the subject's in brackets; or a warning if there are none (then there is
            no subject mask: the subject's features reach the whole picture).
        found: Whether the subject is in the text.
    """

    conditioning: list
    text: str
    shown: str
    found: bool


def encode_prompt(clip: Any, subject: Subject, prompt: str, template: str) -> EncodedPrompt:
    """Encode the positive prompt for a subject.

    Raises:
        ValueError: The CLIP is not SD1.5's, or a text holds halves of characters.
    """
    check_characters("prompt", prompt)
    check_characters("template", template)
    text = fill_template(template, subject.word, prompt)
    tokens = _tokenize(clip, text)
    return _knowing(clip, subject, clip.encode_from_tokens_scheduled(tokens), text, tokens)


def mark_subject(clip: Any, subject: Subject, conditioning: list, text: str) -> EncodedPrompt:
    """A copy of `conditioning`, which was encoded from `text`, that knows where one more subject is.

    Raises:
        ValueError: The CLIP is not SD1.5's, the conditioning is empty or too short for the text, the text is not in
            it, or it holds halves of characters.
    """
    check_characters("text", text)
    if not conditioning:
        raise ValueError(
            "conditioning is empty: connect that of the MoMA Text Encode or CLIP Text Encode with this text."
        )
    tokens = _tokenize(clip, text)
    needed = sum(len(chunk) for chunk in tokens[CLIP_KEY])
    length = min(entry[0].shape[1] for entry in conditioning)
    if length < needed:
        raise ValueError(
            f"text makes {needed} tokens, conditioning has {length}: it was not encoded from this text. Connect the "
            "text output of the MoMA Text Encode (or the text of the CLIP Text Encode) that made the conditioning."
        )
    marked = _knowing(clip, subject, conditioning, text, tokens)
    starts = [text_start(clip, tokens, entry[0], needed) for entry in conditioning]
    return replace(marked, conditioning=moved_tokens(marked.conditioning, subject.key, starts))


def _knowing(clip: Any, subject: Subject, conditioning: list, text: str, tokens: dict[str, list]) -> EncodedPrompt:
    pieces = _pieces(clip, tokens, plain_text(text))
    words = [_word_pieces(clip, bare(word)) for word in plain_text(subject.word).split()]
    positions = find_subject(pieces, words)
    if positions:
        shown = f"{bracketed(pieces, positions)}\n[subject]: tokens {', '.join(map(str, positions))}"
    else:
        shown = (
            f"MoMA: the subject {_quoted(subject.word)} is not among the words of the prompt {_quoted(text)}. The "
            "automatic subject mask is off, and the subject's features reach the whole picture. Say the subject word "
            "in the prompt."
        )
    return EncodedPrompt(mark_tokens(conditioning, {subject.key: positions}), text, shown, bool(positions))


def encode_word(clip: Any, word: str) -> Tensor:
    """The bare subject word(s) for the reference pass: [1, L, context]."""
    encoded = clip.encode_from_tokens(_tokenize(clip, _escaped(plain_text(word))))
    return encoded.detach().to("cpu")


def plain_text(text: str) -> str:
    """What a prompt says without ComfyUI's emphasis: "a (red:1.2) car" reads "a red car", "\\(1\\)" reads "(1)".

    Accents are composed (NFC), as CLIP does; otherwise the MLLM would read them as other letters.
    """
    parts = token_weights(escape_important(text), 1.0)
    return normalize("NFC", unescape_important("".join(part for part, _ in parts)))


def check_characters(input_name: str, text: str) -> None:
    """Check that a text is one: JSON can hold halves of characters, which no tokeniser takes.

    Raises:
        ValueError: Naming the input and the place.
    """
    for place, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise ValueError(
                f"{input_name} holds half a character ({character!r}, after {text[max(place - 20, 0) : place]!r}): the "
                "text was cut within an emoji. Write it again."
            )


def _escaped(plain: str) -> str:
    """Plain text as a prompt in which no parenthesis is emphasis."""
    return plain.replace("(", "\\(").replace(")", "\\)")


def _tokenize(clip: Any, text: str) -> dict[str, list]:
    tokens = clip.tokenize(text)
    if set(tokens) != {CLIP_KEY}:
        raise ValueError(
            f"clip is not the text encoder of an SD1.5 checkpoint (its parts are {', '.join(sorted(tokens))}). Connect "
            "the CLIP of the checkpoint that MODEL comes from."
        )
    return tokens


def _word_pieces(clip: Any, word: str) -> list[Piece]:
    return _pieces(clip, _tokenize(clip, _escaped(word)), word)


def _pieces(clip: Any, tokens: dict[str, list], text: str) -> list[Piece]:
    return read_pieces(tokens[CLIP_KEY], lambda token: str(clip.tokenizer.untokenize([(token, 1.0)])[0][1]), text)


def _quoted(text: str) -> str:
    """A text for a message: on one line, as people write it (Python's `repr` spells emoji and accents as codes)."""
    return f"'{' '.join(text.split())}'"


CHUNK = 77
"""CLIP encodes a text in pieces of so many tokens."""

_TOLERANCE = 1e-2
"""Of the largest value: what lies between encodings of one text in different precisions."""


def text_start(clip: Any, tokens: dict[str, list], conditioning: Tensor, length: int) -> int:
    """At which token of a conditioning a text begins.

    A conditioning of another length than the text's is searched for the text as this CLIP encodes it. Where it is not
    found, as after another way of weighting words, it is taken to be at the beginning if all else can be CLIP's too.

    Args:
        tokens: The text's, as the CLIP's tokenizer gives them.
        conditioning: [B, L, C].
        length: How many tokens the text has.

    Raises:
        ValueError: There is something else in the conditioning, and it cannot be told where the text is.
    """
    found = conditioning.shape[1]
    if found == length:
        return 0
    text = clip.encode_from_tokens(tokens)[0].detach().to("cpu").float()
    values = conditioning[0].detach().to("cpu").float()
    if text.shape == (length, values.shape[1]):
        near = _TOLERANCE * float(text.abs().max())
        for start in range(found - length + 1):
            if float((values[start : start + length] - text).abs().max()) <= near:
                return start
    if found % CHUNK:
        raise ValueError(
            f"conditioning has {found} tokens, which are not CLIP's alone ({CHUNK} at a time): another node, such as "
            "ELLA, put its own beside them, and the text as this clip encodes it is not among them. Connect the CLIP "
            "and the text that the conditioning was made with, or mark the subject before that node."
        )
    return 0
