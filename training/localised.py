"""Where a word is attended to: all over the thing that it names and nowhere else, as a loss for text to image.

A large model's cross-attention to a word lies on the thing by itself; a small one's need not, and MoMA finds its
subject by it. Layouts are guided by the share that lies on the thing (Chen et al., arXiv 2304.03373); as a loss, that
is content with one bright place on it. So what is asked for here is the whole distribution: the thing's, evenly.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .words import SYNONYMS

_LEAST = 1e-6
"""Shares below this count as this."""


class WordAttention:
    """Collects, in one forward of the UNet, how far the attention to each row's words is from covering the thing.

    Attributes:
        losses: Of the layers come to so far, mean over the rows with words: the divergence (Kullback-Leibler, in nats)
            of where the words are attended to from an even cover of the thing; 0 where it is that.
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
        wanted = _shares(adaptive_avg_pool2d(self._masks, side).flatten(1))
        divergence = (wanted * (wanted.clamp(min=_LEAST).log() - _shares(seen).clamp(min=_LEAST).log())).sum(dim=1)
        self.losses.append((divergence * self._rows).sum() / self._rows.sum().clamp(min=1))

    @property
    def loss(self) -> Tensor:
        """Mean over the layers, in nats."""
        return torch.stack(self.losses).mean()


def _shares(values: Tensor) -> Tensor:
    """Rows [B, T] of values from 0 up, each made to sum to 1."""
    return values / values.sum(dim=1, keepdim=True).clamp(min=_LEAST)


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
