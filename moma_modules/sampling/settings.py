"""What our nodes leave on a patched MODEL: frozen settings; and when in the noise schedule they act."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..adapter.loading import Adapter
from ..subject.subject import Subject

KEY = "moma"
"""Our key for attachments, wrappers, callbacks, additional models and transformer options."""


@dataclass(frozen=True)
class Window:
    """When and where something applies.

    Attributes:
        start: Fraction of the noise schedule from which it applies (0 = from the start).
        end: Fraction of the noise schedule up to which it applies (1 = to the end).
        region: None, or [B, h, w] in 0..1 of any size: limits the effect to a part of the picture.
    """

    start: float = 0.0
    end: float = 1.0
    region: Tensor | None = None


@dataclass(frozen=True)
class ImageTokens:
    """Cross-attention to the subject's image tokens, times `weight`.

    Attributes:
        show_on: The node on which the subject mask is shown while the sampler runs, or None.
    """

    weight: float = 1.0
    window: Window = Window()
    show_on: str | None = None


@dataclass(frozen=True)
class Shortcut:
    """Self-attention to the reference's keys and values, times `strength`.

    Attributes:
        latent: VAE encoding of the references [N, 4, h, w], as a VAE gives it (not scaled).
        text: CLIP encoding of the bare subject word(s) [1, L, context].
        noise: Standard normal noise like `latent`, for the reference passes.
    """

    latent: Tensor
    text: Tensor
    noise: Tensor
    strength: float = 1.0
    window: Window = Window(start=0.05)


@dataclass(frozen=True)
class SubjectSettings:
    """Everything that applies to one subject in a run."""

    subject: Subject
    adapter: Adapter
    image_tokens: ImageTokens | None = None
    shortcut: Shortcut | None = None


@dataclass(frozen=True)
class Settings:
    """The attachment of a patched MODEL. Frozen: clones share it."""

    subjects: tuple[SubjectSettings, ...] = ()

    @property
    def has_shortcut(self) -> bool:
        """Whether any subject has one, be it at strength 0."""
        return any(entry.shortcut is not None for entry in self.subjects)

    def with_subject(self, subject: Subject, adapter: Adapter, **parts: Any) -> "Settings":
        """Add a subject, or change its parts (`image_tokens`, `shortcut`) if it is there already."""
        entry = next((s for s in self.subjects if s.subject.key == subject.key), SubjectSettings(subject, adapter))
        changed = replace(entry, adapter=adapter, **parts)
        others = tuple(s for s in self.subjects if s.subject.key != subject.key)
        return replace(self, subjects=(*others, changed))


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
