"""Where a text lies in a CONDITIONING that other nodes may have put more into: ELLA, Conditioning Concat."""

from typing import Any

from torch import Tensor

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
