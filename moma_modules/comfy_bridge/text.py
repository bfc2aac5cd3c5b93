"""Encoding text with a CLIP, and knowing where in it the subject is."""

import logging
import re
from dataclasses import dataclass, replace
from string import punctuation
from typing import Any

from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor

from ..subject import Subject
from ..subject_tokens import fill_template, find_subject
from .conditioning import mark_tokens, moved_tokens
from .placing import text_start

CLIP_KEY = "l"
"""ComfyUI's name for the one text encoder of SD1.5."""
WORD_END = "</w>"
"""How CLIP's vocabulary marks a token that ends a word."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A positive prompt, encoded.

    Attributes:
        conditioning: The CONDITIONING; it knows where the subject's tokens are.
        text: The full text.
        shown: The tokens as CLIP reads them, the subject's in brackets; or a warning if there are none (then there is
            no subject mask: the subject's features reach the whole picture).
    """

    conditioning: list
    text: str
    shown: str


def encode_prompt(clip: Any, subject: Subject, prompt: str, template: str) -> EncodedPrompt:
    """Encode the positive prompt for a subject.

    Raises:
        ValueError: The CLIP is not SD1.5's.
    """
    text = fill_template(template, subject.word, prompt)
    tokens = _tokenize(clip, text)
    return _knowing(clip, subject, clip.encode_from_tokens_scheduled(tokens), text, tokens)


def mark_subject(clip: Any, subject: Subject, conditioning: list, text: str) -> EncodedPrompt:
    """A copy of `conditioning`, which was encoded from `text`, that knows where one more subject is.

    Raises:
        ValueError: The CLIP is not SD1.5's, the conditioning is too short for the text, or the text is not in it.
    """
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
    words = [_tokenize(clip, _escaped(_bare(word)))[CLIP_KEY] for word in plain_text(subject.word).split()]
    positions = find_subject(tokens[CLIP_KEY], words)
    if positions:
        shown = f"{_bracketed(clip, tokens[CLIP_KEY], positions)}\n[subject]: tokens {', '.join(map(str, positions))}"
    else:
        shown = (
            f"MoMA: the subject {subject.word!r} is not among the words of the prompt {text!r}. The automatic subject "
            "mask is off, and the subject's features reach the whole picture. Say the subject word in the prompt."
        )
        logging.warning(shown)
    return EncodedPrompt(mark_tokens(conditioning, {subject.key: positions}), text, shown)


def encode_word(clip: Any, word: str) -> Tensor:
    """The bare subject word(s) for the reference pass: [1, L, context]."""
    encoded = clip.encode_from_tokens(_tokenize(clip, _escaped(plain_text(word))))
    return encoded.detach().to("cpu")


def plain_text(text: str) -> str:
    """What a prompt says without ComfyUI's emphasis: "a (red:1.2) car" reads "a red car", "\\(1\\)" reads "(1)"."""
    parts = token_weights(escape_important(text), 1.0)
    return unescape_important("".join(part for part, _ in parts))


def _bare(word: str) -> str:
    """A word without the punctuation around it, which CLIP joins with whatever punctuation follows in the text."""
    return word.strip(punctuation) or word


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


def _bracketed(clip: Any, chunks: list, positions: tuple[int, ...]) -> str:
    """The prompt put together from its tokens again, those at `positions` in brackets."""
    parts: list[str] = []
    offset = 0
    for chunk in chunks:
        for index, entry in enumerate(chunk):
            piece = _token_text(clip, entry)
            word = piece.removesuffix(WORD_END)
            if offset + index in positions:
                word = f"[{word}]"
            if not piece.startswith("<|"):
                parts.append(word + (" " if piece.endswith(WORD_END) else ""))
        offset += len(chunk)
    return re.sub(r" (?=[.,;:!?](?: |$))", "", "".join(parts).strip())


def _token_text(clip: Any, entry: tuple) -> str:
    if isinstance(entry[0], Tensor):
        return f"(embedding){WORD_END}"
    return str(clip.tokenizer.untokenize([entry])[0][1])
