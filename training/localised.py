"""Where a word is attended to: the share that lies on the thing it names, as a loss for the text-to-image stage.

A large model's cross-attention to a word lies on the thing by itself; a small one's need not, and MoMA finds its
subject by it. The share is the one that Chen et al. guide layouts by (arXiv 2304.03373), here in training.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .words import SYNONYMS


class WordAttention:
    """Collects, in one forward of the UNet, how far the attention to each row's words misses the thing.

    Attributes:
        losses: Of the layers come to so far: 1 - the share that lies on the thing, mean over the rows with words.
    """

    def __init__(self, words: Tensor, masks: Tensor) -> None:
        """Say where the words are.

        Args:
            words: True at the text tokens that name the thing [B, L]; a row without any does not count.
            masks: The share of each place that the thing covers [B, h, w].
        """
        self._words, self._masks = words, masks
        self._rows = words.any(dim=1).float()
        self.losses: list[Tensor] = []

    def see(self, q: Tensor, k: Tensor, heads: int) -> None:
        """A layer's attention: queries [B, T, C], keys [B, L, C]; a layer without text is passed over."""
        if k.shape[1] != self._words.shape[1]:
            return
        queries, keys = (part.float().unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k))
        shares = (queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5).softmax(dim=-1)
        seen = (shares * self._words[:, None, None]).sum(dim=-1).mean(dim=1)
        side = round(seen.shape[1] ** 0.5)
        inside = adaptive_avg_pool2d(self._masks, side).flatten(1)
        missed = 1 - (seen * inside).sum(dim=1) / seen.sum(dim=1).clamp(min=1e-6)
        self.losses.append((missed * self._rows).sum() / self._rows.sum().clamp(min=1))

    @property
    def loss(self) -> Tensor:
        """Mean over the layers; 0..1."""
        return torch.stack(self.losses).mean()


def word_places(tokens: list[int], kind: str, encode: Any) -> list[bool]:
    """At which of a text's tokens a class is named.

    Args:
        kind: One of `world.CLASSES`.
        encode: A word as its tokens, without start and end.
    """
    places = [False] * len(tokens)
    for ids in _tokens_of(kind, encode):
        for i in range(len(tokens) - len(ids) + 1):
            if tuple(tokens[i : i + len(ids)]) == ids:
                places[i : i + len(ids)] = [True] * len(ids)
    return places


@functools.cache
def _tokens_of(kind: str, encode: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(encode(word)) for word in sorted(set(SYNONYMS[kind])))
