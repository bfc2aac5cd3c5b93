"""The settings in which the small world is drawn to see whether the evaluation ranks them as the truth does."""

from dataclasses import dataclass, replace
from typing import Any

from workbench.small_world import CFG

from .drawn import Variant

_NO_MASK = "no subject mask"
OTHERS: tuple[dict[str, Any], ...] = (
    {"weight": 0.6},
    {"cfg": 1.5},
    {"parts": _NO_MASK},
    {"parts": _NO_MASK, "cfg": 1.5},
)
"""Each at every other strength; those without a subject mask up to `FURTHEST`. These let the prompt slip, the more the
stronger the shortcut is, as the reference's background comes along; otherwise nearly all prompts come right, and there
would be nothing to rank."""
FURTHEST = 1.5
RECOMMENDED = {"context": 1.0, "texture": 0.4}
"""The README's strengths."""
PARTS = {
    "nothing of MoMA": {"plain": True},
    "no image tokens": {"image_tokens": False},
    "no shortcut": {"shortcut": False},
    _NO_MASK: {"mask": False},
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
        for other in OTHERS:
            reach = FURTHEST if "parts" in other else 1.0
            found += [Setting(task, round(reach * strength, 3), **other) for strength in steps[::2]]
        found += [Setting(task, recommended, parts=parts) for parts in PARTS]
    return list(dict.fromkeys(found))
