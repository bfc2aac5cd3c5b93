"""Several endings behind one beginning, in one forward: who sees whom, and at which positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """The tokens of one forward in a row: what is left of the beginning, then each ending.

    Attributes:
        before: Tokens of the beginning whose keys and values are known.
        beginning: Tokens of it that are computed too.
        endings: Lengths of the endings, each at least 1.
    """

    before: int
    beginning: int
    endings: tuple[int, ...]

    def positions(self) -> Tensor:
        """[1, L]: every ending goes on where the beginning ends."""
        start = self.before + self.beginning
        parts = [torch.arange(self.before, start), *(torch.arange(start, start + length) for length in self.endings)]
        return torch.cat(parts)[None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, L, before + L], to be added: 0 where a token is seen, the most negative number where not.

        All see the beginning up to themselves; an ending sees itself up to the token, and no other.
        """
        total = self.beginning + sum(self.endings)
        seen = torch.zeros(total, self.before + total, dtype=torch.bool)
        seen[:, : self.before + self.beginning] = True
        start = 0
        for length in (self.beginning, *self.endings):
            own = torch.ones(length, length, dtype=torch.bool).tril_()
            seen[start : start + length, self.before + start : self.before + start + length] = own
            start += length
        hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return hidden[None, None]

    def last_tokens(self) -> list[int]:
        """Where in the row each ending ends."""
        return [end - 1 for end in accumulate(self.endings, initial=self.beginning)][1:]


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all have in common."""
    shortest = min(len(one) for one in sequences)
    for place in range(shortest):
        if len({one[place] for one in sequences}) > 1:
            return place
    return shortest
