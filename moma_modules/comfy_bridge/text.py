"""Encoding text with a CLIP, and knowing where in it the subject is."""

import logging
from typing import Any

from torch import Tensor

from ..subject import Subject
from ..subject_tokens import fill_template, find_subject
from .conditioning import mark_tokens

CLIP_KEY = "l"
"""ComfyUI's name for the one text encoder of SD1.5."""


def encode_prompt(clip: Any, subject: Subject, prompt: str, template: str) -> tuple[list, str, str | None]:
    """Encode the positive prompt for a subject.

    Returns:
        The CONDITIONING, the full text, and a warning if the subject does not occur in it (then there is no subject
        mask: the subject's features reach the whole picture).

    Raises:
        ValueError: The CLIP is not SD1.5's.
    """
    text = fill_template(template, subject.word, prompt)
    tokens = _tokenize(clip, text)
    conditioning, warning = _marked(clip, subject, clip.encode_from_tokens_scheduled(tokens), text, tokens)
    return conditioning, text, warning


def mark_subject(clip: Any, subject: Subject, conditioning: list, text: str) -> tuple[list, str | None]:
    """A copy of `conditioning`, which was encoded from `text`, that knows where one more subject is.

    Returns:
        The CONDITIONING, and a warning as for `encode_prompt`.

    Raises:
        ValueError: The CLIP is not SD1.5's, or the conditioning is too short for the text.
    """
    tokens = _tokenize(clip, text)
    needed = sum(len(chunk) for chunk in tokens[CLIP_KEY])
    length = min(entry[0].shape[1] for entry in conditioning)
    if length < needed:
        raise ValueError(
            f"text makes {needed} tokens, conditioning has {length}: it was not encoded from this text. Connect "
            "the text output of the MoMA Text Encode (or the text of the CLIP Text Encode) that made the conditioning."
        )
    return _marked(clip, subject, conditioning, text, tokens)


def _marked(
    clip: Any, subject: Subject, conditioning: list, text: str, tokens: dict[str, list]
) -> tuple[list, str | None]:
    words = [_tokenize(clip, word)[CLIP_KEY] for word in subject.word.split()]
    positions = find_subject(tokens[CLIP_KEY], words)
    warning = None
    if not positions:
        warning = (
            f"MoMA: the subject {subject.word!r} is not among the words of the prompt {text!r}. The automatic subject "
            "mask is off, and the subject's features reach the whole picture. Say the subject word in the prompt."
        )
        logging.warning(warning)
    return mark_tokens(conditioning, {subject.key: positions}), warning


def encode_word(clip: Any, word: str) -> Tensor:
    """The bare subject word(s) for the reference pass: [1, L, context]."""
    encoded = clip.encode_from_tokens(_tokenize(clip, word))
    return encoded.detach().to("cpu")


def _tokenize(clip: Any, text: str) -> dict[str, list]:
    tokens = clip.tokenize(text)
    if set(tokens) != {CLIP_KEY}:
        raise ValueError(
            f"clip is not the text encoder of an SD1.5 checkpoint (its parts are {', '.join(sorted(tokens))}). Connect "
            "the CLIP of the checkpoint that MODEL comes from."
        )
    return tokens
