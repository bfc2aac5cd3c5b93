"""When in the noise schedule a subject's parts act."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .settings import SubjectSettings, Window


@dataclass(frozen=True)
class Range:
    """Noise levels in which something applies: end <= sigma <= start."""

    start: float
    end: float
    always: bool

    def apply(self, factor: Tensor, sigma: Tensor | None) -> Tensor:
        """`factor`, or 0 everywhere outside the range."""
        # Multiplied rather than branched on: reading sigma would make the CPU wait for the GPU in every step.
        if sigma is None or self.always:
            return factor
        level = sigma.flatten()[0]
        return factor * ((level <= self.start) & (level >= self.end))


@dataclass(frozen=True)
class Gates:
    """The noise ranges of a subject's two parts."""

    cross: Range
    shortcut: Range

    @classmethod
    def of(cls, entry: SubjectSettings, model_sampling: Any) -> "Gates":
        """Those of a subject, for the noise schedule of a model."""

        def span(part: Any) -> Range:
            window = Window() if part is None else part.window
            sigma = model_sampling.percent_to_sigma
            always = window.start <= 0 and window.end >= 1
            return Range(float(sigma(window.start)), float(sigma(window.end)), always)

        return cls(span(entry.image_tokens), span(entry.shortcut))
