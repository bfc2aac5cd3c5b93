"""What a strength study computes: strengths and weights, written as text."""

from dataclasses import dataclass

STRENGTHS = (0.0, 2.0)
WEIGHTS = (0.0, 3.0)


@dataclass(frozen=True)
class Study:
    """Strengths of the shortcut (columns) and weights of the adapter (rows)."""

    strengths: tuple[float, ...]
    weights: tuple[float, ...]


def parse_study(strengths: str, weights: str, most: int) -> Study:
    """Read a study.

    Args:
        most: Pictures that it may have.

    Raises:
        ValueError: Naming the input, what stands there and what to write.
    """
    study = Study(_numbers("strengths", strengths, STRENGTHS), _numbers("weights", weights, WEIGHTS))
    count = len(study.strengths) * len(study.weights)
    if count > most:
        raise ValueError(
            f"strengths and weights make {len(study.strengths)} x {len(study.weights)} = {count} pictures; at most "
            f"{most} fit on a sheet. Remove some numbers."
        )
    return study


def _numbers(name: str, text: str, limits: tuple[float, float]) -> tuple[float, ...]:
    """Different numbers in their order; one that stands there twice counts once."""
    low, high = limits
    advice = f"Write numbers from {low:g} to {high:g} separated by commas, as in '0.4, 0.7, 1.0'."
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{name} is empty. {advice}")
    found: dict[float, None] = {}
    for part in parts:
        try:
            number = float(part)
        except ValueError:
            raise ValueError(f"{name}: {part!r} is not a number. {advice}") from None
        if not low <= number <= high:
            raise ValueError(f"{name}: {part} is out of range. {advice}")
        found[number] = None
    return tuple(found)
