"""Finding a subject's tokens in a tokenised prompt."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch

PROMPT_TEMPLATE = "photo of a {subject}. {prompt}"
"""The positive prompt that MoMA was trained and shown with."""


def fill_template(template: str, subject: str, prompt: str) -> str:
    """Put subject and prompt into `template`; other braces are left alone (they are prompt syntax)."""
    values = {"{subject}": subject, "{prompt}": prompt}
    # In one pass: a "{prompt}" that a user writes into a subject or prompt is text.
    return re.sub(r"\{(?:subject|prompt)\}", lambda found: values[found[0]], template)


def find_subject(prompt_chunks: Sequence, word_chunks: Sequence[Sequence]) -> tuple[int, ...]:
    """Positions of the subject's tokens in the text embedding of a prompt.

    For each word of the subject its token sequence is searched; every occurrence counts.

    Args:
        prompt_chunks: A tokenised prompt as ComfyUI gives it: chunks of (token, weight, ...).
        word_chunks: Each word of the subject, tokenised by itself in the same form.

    Returns:
        Sorted flat positions (chunk * chunk length + index); empty if the subject does not occur.
    """
    text = _content(prompt_chunks)
    keys = [key for key, _ in text]
    found: set[int] = set()
    for chunks in word_chunks:
        word = [key for key, _ in _content(chunks)]
        if not word:
            continue
        for start in range(len(keys) - len(word) + 1):
            if keys[start : start + len(word)] == word:
                found.update(position for _, position in text[start : start + len(word)])
    return tuple(sorted(found))


def _content(chunks: Sequence) -> list[tuple[Any, int]]:
    """The tokens between start and end marks, as (comparable key, flat position)."""
    content: list[tuple[Any, int]] = []
    offset = 0
    for chunk in chunks:
        tokens = [_key(entry[0]) for entry in chunk]
        end = _end_mark(chunks)
        stop = tokens.index(end, 1) if end in tokens[1:] else len(tokens)
        content += [(tokens[i], offset + i) for i in range(1, stop)]
        offset += len(tokens)
    return content


def _end_mark(chunks: Sequence) -> Any:
    """CLIP closes and (in SD1.5) pads every chunk with the end token: the last entry of the last chunk."""
    return _key(chunks[-1][-1][0])


def _key(token: Any) -> Any:
    """Tokens are ids, or tensors for textual-inversion embeddings."""
    if isinstance(token, torch.Tensor):
        return hashlib.sha256(token.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
    return int(token)
