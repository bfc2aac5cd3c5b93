"""Finding a subject's tokens in a tokenised prompt."""

import re
import unicodedata
from collections.abc import Sequence

from .clip_tokens import Piece

PROMPT_TEMPLATE = "photo of a {subject}. {prompt}"
"""The positive prompt that MoMA was trained and shown with."""

_EMBEDDING = re.compile(r"(?:^|\s)embedding:\S+$")
_PART_OF_WORDS = "#%&@"
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""How the Unicode names of letters begin in scripts that write words without white space between them."""


def fill_template(template: str, subject: str, prompt: str) -> str:
    """Put subject and prompt into `template`; other braces are left alone (they are prompt syntax).

    An embedding's name ends at white space: a mark that follows it in the template is kept apart from it.
    """
    values = {"{subject}": subject, "{prompt}": prompt}

    def value(found: re.Match[str]) -> str:
        text, after = values[found[0]], template[found.end() : found.end() + 1]
        return f"{text} " if _EMBEDDING.search(text) and after.strip("):") else text

    # In one pass: a "{prompt}" that a user writes into a subject or prompt is text.
    return re.sub(r"\{(?:subject|prompt)\}", value, template)


def find_subject(text: Sequence[Piece], words: Sequence[Sequence[Piece]]) -> tuple[int, ...]:
    """Positions of the subject's tokens in the text embedding of a prompt.

    For each word of the subject its token sequence is searched; every occurrence counts. A word is also found by its
    characters: CLIP joins symbols with the punctuation that follows them, and the letters of scripts without white
    space with one another. Then every token that holds a part of the word counts.

    Args:
        text: The prompt, from `read_pieces`.
        words: Each word of the subject, tokenised by itself.

    Returns:
        Sorted flat positions (chunk * chunk length + index); empty if the subject does not occur.
    """
    found: set[int] = set()
    for word in words:
        if word:
            found |= _by_tokens(text, word) | _by_characters(text, word)
    return tuple(sorted(found))


def bare(word: str) -> str:
    """A word without the quotes, brackets and sentence marks around it, which CLIP joins with what follows them."""
    kept = [
        i for i, letter in enumerate(word) if letter in _PART_OF_WORDS or unicodedata.category(letter)[0] not in "PC"
    ]
    return word[kept[0] : kept[-1] + 1] if kept else word


def _by_tokens(text: Sequence[Piece], word: Sequence[Piece]) -> set[int]:
    """Positions of the word's token sequence, wherever it occurs."""
    keys = [key for piece in text for key in piece.keys]
    positions = [position for piece in text for position in piece.positions]
    wanted = [key for piece in word for key in piece.keys]
    found: set[int] = set()
    for start in range(len(keys) - len(wanted) + 1):
        if keys[start : start + len(wanted)] == wanted:
            found.update(positions[start : start + len(wanted)])
    return found


def _by_characters(text: Sequence[Piece], word: Sequence[Piece]) -> set[int]:
    """Positions of the tokens that hold a part of the word, where its characters occur."""
    found: set[int] = set()
    for i in range(len(text) - len(word) + 1):
        window = text[i : i + len(word)]
        if any(piece.spaced for piece in window[1:]):
            continue
        places = [
            _places(piece.characters, part.characters, at_start=n > 0, at_end=n < len(word) - 1)
            for n, (piece, part) in enumerate(zip(window, word, strict=True))
        ]
        if all(places):
            for piece, part, starts in zip(window, word, places, strict=True):
                for start in starts:
                    held = piece.covering[start : start + len(part.characters)]
                    found |= {piece.positions[token] for tokens in held for token in tokens}
    return found


def _places(text: Sequence[str], part: Sequence[str], at_start: bool, at_end: bool) -> list[int]:
    """Where in a piece a part of a word may be: not within a word of a script that puts white space between words."""
    last = len(text) - len(part)
    return [
        start
        for start in range(last + 1)
        if tuple(text[start : start + len(part)]) == tuple(part)
        and (start == 0 or (not at_start and not (_is_spaced(text[start - 1]) and _is_spaced(part[0]))))
        and (start == last or (not at_end and not (_is_spaced(part[-1]) and _is_spaced(text[start + len(part)]))))
        and (start == last or not _is_mark(text[start + len(part)]))
    ]


def _is_spaced(letter: str) -> bool:
    """Whether it is a letter of a script that puts white space between words."""
    return letter.isalpha() and not unicodedata.name(letter, "").startswith(_WITHOUT_SPACES)


def _is_mark(letter: str) -> bool:
    """Whether it combines with the letter before it; a variation selector only chooses that one's look."""
    return unicodedata.category(letter)[0] == "M" and letter not in "\ufe0e\ufe0f"
