"""What of the UNet a forward came to: whether all of it, in order, once."""

from dataclasses import dataclass, field

from .unet import BLOCKS

ORDER = tuple(sorted(range(len(BLOCKS)), key=lambda block: ("input", "middle", "output").index(BLOCKS[block][0])))
"""The blocks in the order in which the UNet comes to them."""


@dataclass
class Passes:
    """The passes of the UNet over one input. There may be several; the first that is complete counts.

    Attributes:
        started: Whether the UNet was asked to run at all; a cache may answer in its place.
    """

    started: bool = False
    _cross: list[int] = field(default_factory=list)
    _whole: list[int] = field(default_factory=list)
    _parts: list[int] = field(default_factory=list)
    _over: bool = False

    @property
    def complete(self) -> bool:
        """Whether one came to every cross-attention layer once, in order."""
        return tuple(self._cross) == ORDER

    @property
    def own_complete(self) -> bool:
        """Whether every self-attention layer was come to with all rows, where there are patches for them."""
        return set(self._whole) == set(ORDER)

    @property
    def touched(self) -> bool:
        """Whether any cross-attention layer was come to."""
        return bool(self._cross)

    def start(self) -> bool:
        """The UNet starts; returns whether what earlier passes collected is to be forgotten."""
        self.started = True
        self._over = self.complete
        if not self._over:
            self._cross, self._whole, self._parts = [], [], []
        return not self._over

    def cross(self, block: int) -> bool:
        """A cross-attention layer is come to; returns whether its map counts.

        Raises:
            ValueError: The UNet has started again, and nobody said so.
        """
        if self._over:
            return False
        if self._cross and ORDER.index(block) < ORDER.index(self._cross[-1]):
            raise ValueError(
                "MoMA: another node runs the UNet more than once for one evaluation, in a way that does not show which "
                "of the runs makes the picture. Remove that node, or MoMA."
            )
        self._cross.append(block)
        return True

    def own(self, block: int, part: bool) -> None:
        """A self-attention layer is come to, with all rows or with a part of them."""
        (self._parts if part else self._whole).append(block)

    def finish(self) -> None:
        """The UNet has run.

        Raises:
            ValueError: A self-attention layer was computed in parts only, so that no row got the features.
        """
        missed = [block for block in self._parts if block not in self._whole]
        if missed:
            name, number = BLOCKS[missed[0]]
            raise ValueError(
                f"MoMA: another node computes the self-attention of {name} block {number} for some rows of a batch at "
                "a time, and MoMA must know which rows these are. Remove that node, or Self-Attn Shortcut."
            )
