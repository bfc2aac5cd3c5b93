"""The settings in which the small world is drawn to see whether the evaluation ranks them as the truth does."""

from dataclasses import dataclass, replace
from typing import Any

from workbench.small_world import CFG

from .drawn import Variant

OTHERS = ((0.6, CFG), (1.0, 1.0), (1.0, 1.5), (1.0, 2.0))
"""Weights with CFGs, at every other strength. A low CFG lets the prompt slip; otherwise nearly all of them come right,
and there would be nothing to rank."""
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
    weight: float = 1.0
    cfg: float = CFG
    parts: str = WHOLE

    def variant(self) -> Variant:
        """For `SmallWorld.draw`."""
        kept: dict[str, Any] = PARTS.get(self.parts, {})
        return replace(Variant(strength=self.strength, weight=self.weight, cfg=self.cfg), **kept)


def settings(strengths: int) -> list[Setting]:
    """All settings of both tasks.

    Args:
        strengths: How many, from 0 to 1.
    """
    steps = [round(i / (strengths - 1), 3) for i in range(strengths)]
    found = []
    for task, recommended in RECOMMENDED.items():
        found += [Setting(task, strength) for strength in steps]
        found += [Setting(task, strength, *other) for other in OTHERS for strength in steps[::2]]
        found += [Setting(task, recommended, parts=parts) for parts in PARTS]
    return found
