"""CLIP's tokens as text: its vocabulary spells bytes and cuts inside characters, people read characters."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..host.disk import content_hash

WORD_END = "</w>"
"""How CLIP's vocabulary marks a token that ends a piece."""
EMBEDDING = "(embedding)"
"""How a textual-inversion embedding is shown."""

_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# GPT-2's spelling of bytes: printable ones as themselves, the others in order from U+0100 on.
_BYTES = {chr(byte): byte for byte in _PLAIN}
_BYTES |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))}


@dataclass(frozen=True)
class Piece:
    """What CLIP tokenises by itself: a run of letters, one digit, a run of other characters, or an embedding.

    Attributes:
        characters: As CLIP reads them: composed (NFC), lower-case.
        covering: For each character, the indices into `keys` of the tokens that hold a part of it.
        keys: What tells the tokens apart.
        positions: Where the tokens are in the text embedding.
        spaced: Whether there is white space before it in the text; True where that is not known.
    """

    characters: tuple[str, ...]
    covering: tuple[range, ...]
    keys: tuple[Any, ...]
    positions: tuple[int, ...]
    spaced: bool = True


def read_pieces(chunks: Sequence, spelling: Callable[[Any], str], text: str | None = None) -> list[Piece]:
    """The pieces of a tokenised text, without start, end and padding.

    Args:
        chunks: As ComfyUI gives them: chunks of (token, weight, ...); a token is an id, or a tensor (an embedding).
        spelling: An id's entry in CLIP's vocabulary.
        text: What was tokenised, without emphasis; it tells where white space is.
    """
    pieces: list[Piece] = []
    begun: list[tuple[Any, int, str]] = []
    for token, position in _content(chunks):
        if isinstance(token, torch.Tensor):
            key = content_hash(token.float().cpu())
            pieces.append(Piece((EMBEDDING,), (range(1),), (key,), (position,)))
            continue
        entry = spelling(token)
        begun.append((int(token), position, entry.removesuffix(WORD_END)))
        if entry.endswith(WORD_END):
            pieces.append(_piece(begun))
            begun = []
    if begun:
        pieces.append(_piece(begun))
    return pieces if text is None else _with_spaces(pieces, text)


def bracketed(pieces: Iterable[Piece], positions: Iterable[int]) -> str:
    """The text put together again, with the tokens at `positions` in brackets, each with all its characters."""
    wanted, parts = set(positions), []
    for piece in pieces:
        parts.append(" " if piece.spaced else "")
        start = 0
        for end in range(1, len(piece.characters) + 1):
            if end < len(piece.characters) and set(piece.covering[end - 1]) & set(piece.covering[end]):
                continue  # a token goes on into the next character
            tokens = {piece.positions[i] for covering in piece.covering[start:end] for i in covering}
            shown = "".join(piece.characters[start:end])
            parts.append(f"[{shown}]" if tokens & wanted else shown)
            start = end
    return "".join(parts).strip()


def _content(chunks: Sequence) -> list[tuple[Any, int]]:
    """The tokens between start and end marks, with their flat positions."""
    content: list[tuple[Any, int]] = []
    offset = 0
    mark = chunks[-1][-1][0]  # CLIP closes and (in SD1.5) pads every chunk with the end token
    for chunk in chunks:
        for index, entry in enumerate(chunk[1:], 1):
            if not isinstance(entry[0], torch.Tensor) and entry[0] == mark:
                break
            content.append((entry[0], offset + index))
        offset += len(chunk)
    return content


def _piece(tokens: Sequence[tuple[Any, int, str]]) -> Piece:
    keys, positions, entries = zip(*tokens, strict=True)
    spelled = [bytes(_BYTES[letter] for letter in entry) for entry in entries]
    owner = [i for i, part in enumerate(spelled) for _ in part]
    text, codec = _decoded(b"".join(spelled))
    covering, place = [], 0
    for character in text:
        end = place + len(character.encode(codec))
        covering.append(range(owner[place], owner[end - 1] + 1))
        place = end
    return Piece(tuple(text), tuple(covering), keys, positions)


def _decoded(content: bytes) -> tuple[str, str]:
    """A piece as text, and the encoding. The pieces of a text are UTF-8, unless someone made up the tokens."""
    try:
        return content.decode(), "utf-8"
    except UnicodeDecodeError:
        return content.decode("latin-1"), "latin-1"


def _with_spaces(pieces: list[Piece], text: str) -> list[Piece]:
    """The pieces, knowing whether white space is before them: they are looked up in the text one after another."""
    text = visible("".join(letter.lower() for letter in unicodedata.normalize("NFC", text)))
    place, lost, found = 0, False, []
    for piece in pieces:
        shown = visible("".join(piece.characters))
        start = text.find(shown, place)
        lost = start < 0 or not (lost or not text[place:start].strip())
        if lost:  # CLIP reads it differently, or it is an embedding
            found.append(piece)
        else:
            found.append(replace(piece, spaced=start > place))
            place = start + len(shown)
    return found


def visible(text: str) -> str:
    """Without control and format characters, which some versions of CLIP's tokenizer leave out."""
    return "".join(letter for letter in text if letter.isspace() or unicodedata.category(letter)[0] != "C")
