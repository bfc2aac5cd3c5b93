"""The settings in which the small world is drawn to see whether the evaluation ranks them as the truth does."""

from dataclasses import dataclass, replace
from typing import Any

from .drawn import Variant

WEIGHTS = (0.6, 0.8, 1.0)
RECOMMENDED = {"context": 1.0, "texture": 0.4}
"""The README's strengths."""
PARTS = {
    "nothing of MoMA": {"plain": True},
    "no image tokens": {"image_tokens": False},
    "no shortcut": {"shortcut": False},
    "no subject mask": {"mask": False},
    "prompt not shown to the language model": {"told": False},
}
WHOLE = "all"
PROMPT = "probe-T"
TRUTHS = {"likeness": ("probe-I subject", "colours-I subject"), "prompt": (PROMPT,)}
"""What the probe knows of a setting, and the evaluation's measures that should rank settings alike."""


@dataclass(frozen=True)
class Setting:
    """A way to draw; `parts` is `WHOLE` or a key of `PARTS`."""

    task: str
    strength: float
    weight: float
    parts: str = WHOLE

    def variant(self) -> Variant:
        """For `SmallWorld.draw`."""
        kept: dict[str, Any] = PARTS.get(self.parts, {})
        return replace(Variant(strength=self.strength, weight=self.weight), **kept)


def settings(strengths: int) -> list[Setting]:
    """All settings of both tasks.

    Args:
        strengths: How many, from 0 to 1.
    """
    found = []
    for task, recommended in RECOMMENDED.items():
        for weight in WEIGHTS:
            found += [Setting(task, round(i / (strengths - 1), 3), weight) for i in range(strengths)]
        found += [Setting(task, recommended, 1.0, parts) for parts in PARTS]
    return found
