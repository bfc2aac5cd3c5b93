"""Choices in prompts: of `{beach|mountain}` each run takes one, the same one wherever it is written."""

import hashlib
import re
from uuid import uuid4

_ESCAPED = re.compile(r"\\([{}|])")


def choose(text: str, draw: str) -> str:
    r"""Put one option in the place of each choice, also of those within options.

    Braces without a bar are left alone (`{subject}`), and so are escaped ones, which lose their backslash (`\{a|b\}`).

    Args:
        text: What the user wrote.
        draw: What decides, such as the run's id: with the same one, equal choices are decided alike in any text.
    """
    return _ESCAPED.sub(r"\1", _chosen(text, draw))


def has_choice(*texts: str | None) -> bool:
    """Whether one of the texts leaves a choice; None stands for one that is not known yet."""
    return any(text is not None and _chosen(text, "") != text for text in texts)


def fingerprint(*texts: str | None) -> str:
    """For a node's `fingerprint_inputs`: another one each time if there is a choice, so that every run chooses."""
    return uuid4().hex if has_choice(*texts) else ""


def _chosen(text: str, draw: str) -> str:
    parts, place = [], 0
    while place < len(text):
        end, options = _options(text, place) if text[place] == "{" else (place, [])
        if len(options) > 1:
            digest = hashlib.sha256(f"{draw}|{text[place:end]}".encode(errors="surrogatepass")).digest()
            parts.append(_chosen(options[int.from_bytes(digest[:8], "big") % len(options)], draw))
            place = end
        else:
            width = 2 if text[place] == "\\" else 1
            parts.append(text[place : place + width])
            place += width
    return "".join(parts)


def _options(text: str, start: int) -> tuple[int, list[str]]:
    """The options of the braces that open at `start`, and where they end; none if they do not close."""
    depth, place, begin, options = 0, start, start + 1, []
    while place < len(text):
        letter = text[place]
        depth += (letter == "{") - (letter == "}")
        if (letter == "|" and depth == 1) or depth == 0:
            options.append(text[begin:place])
            begin = place + 1
        if depth == 0:
            return place + 1, options
        place += 2 if letter == "\\" else 1
    return start, []
