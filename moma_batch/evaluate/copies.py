"""The copy check: how much of a reference's background came along into its pictures.

`s` be the cosine of what is around the subject in a picture and in a reference. A picture's copy check is its `s` with
its own reference, less what it has with the other references (a prompt may ask for such a place), less what pictures
of other references have with its own (a plain background is like many), plus what those have with references that are
neither theirs nor its own: the interaction of a table of all pictures by all references. If nothing is copied, and
every reference has as many pictures, it is 0 on average, however alike pictures or references are to all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Vector = np.ndarray[Any, Any]
LEAST = 3
"""References, without which a copy and a reference that is like all pictures cannot be told apart."""


@dataclass
class Copies:
    """The sums that the check needs; means of cosines are cosines of means, so no table is made.

    Attributes:
        references: Unit vectors [D] of what is around the subjects, by the references' keys.
    """

    references: Mapping[str, Vector]
    _sums: dict[str, Vector] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """No picture yet."""
        self._all_references: Vector = sum(self.references.values(), np.zeros(()))

    def add(self, pictures: Iterable[tuple[str, Vector]]) -> None:
        """Take in pictures: their references' keys, and unit vectors [D] of what is around their subjects."""
        for reference, vector in pictures:
            if reference in self.references:
                self._sums[reference] = self._sums.get(reference, 0) + vector
                self._counts[reference] = self._counts.get(reference, 0) + 1
        self._all: Vector = sum(self._sums.values(), np.zeros(()))
        self._count = sum(self._counts.values())
        self._own = sum(float(self._sums[key] @ self.references[key]) for key in self._sums)

    def of(self, reference: str, picture: Vector) -> float | None:
        """The check of a picture that was added; None if there are not pictures of at least three references."""
        if len(self._counts) < LEAST or reference not in self.references:
            return None
        own, mine = self.references[reference], self._sums[reference]
        count = self._count - self._counts[reference]
        rest, strangers = self._all_references - own, self._all - mine
        others = len(self.references) - 1
        apart = (float(strangers @ rest) - (self._own - float(mine @ own))) / ((others - 1) * count)
        return float(picture @ own - picture @ rest / others - strangers @ own / count) + apart
