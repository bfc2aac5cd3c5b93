"""A user's own training data: a folder of pictures with `metadata.jsonl`, as the imagefolder convention has it.

Each line names a target picture, the mask of the subject in it, the word for the subject and a prompt; and, where there
is one, another picture of the same subject as reference. Without one, the picture itself is the reference, moved,
scaled and flipped.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

METADATA = "metadata.jsonl"
_SHOWN = 5
"""How many faults a message lists."""

Picture = np.ndarray[Any, Any]
"""uint8 [S, S, 3]."""

Mask = np.ndarray[Any, Any]
"""bool [S, S], True on the subject."""


@dataclass(frozen=True)
class Entry:
    """A line of the metadata.

    Attributes:
        line: Its number, from 1.
        reference, reference_mask: Both, or neither.
        strength: Of the shortcut: lower where the prompt gives the subject another look than the reference has.
    """

    folder: Path
    line: int
    picture: str
    mask: str
    word: str
    prompt: str
    reference: str | None
    reference_mask: str | None
    strength: float

    def __str__(self) -> str:
        """What messages call it."""
        return f"{self.folder / METADATA}, line {self.line}"

    def files(self) -> list[Path]:
        """All files that it names."""
        names = (self.picture, self.mask, self.reference, self.reference_mask)
        return [self.folder / name for name in names if name]

    def target(self, size: int) -> tuple[Picture, Mask]:
        """The picture and its mask, a square of this side.

        Raises:
            ValueError: A file is no picture, or the mask is empty.
        """
        return self._square(self.picture, self.mask, size)

    def shown(self, size: int, variant: int) -> tuple[Picture, Mask]:
        """The reference and its mask; other variants of a line without one are moved in another way.

        Raises:
            ValueError: See `target`.
        """
        if self.reference is not None and self.reference_mask is not None:
            return self._square(self.reference, self.reference_mask, size)
        return _moved(*self.target(size), random.Random(f"{self.picture} {variant}"))

    def _square(self, picture: str, mask: str, size: int) -> tuple[Picture, Mask]:
        opened = self._opened(picture, "RGB")
        stencil = self._opened(mask, "L").resize(opened.size, Image.Resampling.BILINEAR)
        stencil = stencil.point([255 * (value > 127) for value in range(256)])
        if stencil.getbbox() is None:
            raise ValueError(f"{self}: the mask {mask} is empty. It must be white where the subject is.")
        box = _around(stencil.getbbox(), opened.size)
        small = opened.resize((size, size), Image.Resampling.LANCZOS, box)
        inside = np.asarray(stencil.resize((size, size), Image.Resampling.BILINEAR, box)) > 127
        if not inside.any():
            raise ValueError(f"{self}: at {size}x{size} nothing is left of the subject in {mask}.")
        return np.asarray(small), inside

    def _opened(self, name: str, mode: str) -> Image.Image:
        try:
            with Image.open(self.folder / name) as file:
                return file.convert(mode)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self}: {name} is not a readable picture: {error}") from error


def read_entries(folder: Path) -> list[Entry]:
    """The lines of a folder's metadata, checked.

    Raises:
        ValueError: There is none, or some lines are wrong; the message names file, lines and what is wrong.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: training data is a folder with pictures and this file, see docs/training.md."
        )
    entries: list[Entry] = []
    faults: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(_entry(folder, number, line))
            except ValueError as error:
                faults.append(f"line {number}: {error}")
    if faults:
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{path}:\n" + "\n".join(faults[:_SHOWN]) + more)
    if not entries:
        raise ValueError(f"{path} has no lines.")
    return entries


def _entry(folder: Path, number: int, line: str) -> Entry:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, expected an object")
    reference, reference_mask = (_file(folder, values, key, needed=False) for key in ("reference", "reference_mask"))
    if (reference is None) != (reference_mask is None):
        raise ValueError("reference and reference_mask belong together; one of them is missing")
    strength = values.get("strength", 1.0)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength!r}, expected a number from 0 to 1")
    return Entry(
        folder=folder,
        line=number,
        picture=_file(folder, values, "file_name") or "",
        mask=_file(folder, values, "mask") or "",
        word=_text(values, "word"),
        prompt=_text(values, "prompt" if "prompt" in values else "caption"),
        reference=reference,
        reference_mask=reference_mask,
        strength=float(strength),
    )


def _text(values: dict[str, Any], key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str) or not text.strip():
        name = "prompt (or caption)" if key == "caption" else key
        raise ValueError(f"{name} is {text!r}, expected text")
    return text.strip()


def _file(folder: Path, values: dict[str, Any], key: str, needed: bool = True) -> str | None:
    name = values.get(key)
    if name is None and not needed:
        return None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key} is {name!r}, expected the name of a file")
    if not (folder / name).is_file():
        raise ValueError(f"{key} is {name!r}, which is not in the folder")
    return name


def _around(subject: tuple[int, int, int, int] | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest square of a picture that has the subject nearest to its middle."""
    width, height = size
    side = min(size)
    left, top, right, bottom = subject or (0, 0, width, height)
    x = min(max((left + right - side) // 2, 0), width - side)
    y = min(max((top + bottom - side) // 2, 0), height - side)
    return x, y, x + side, y + side


def _moved(picture: Picture, mask: Mask, rng: random.Random) -> tuple[Picture, Mask]:
    """The same picture flipped by chance, scaled and moved a little, white where it ends.

    Trained to draw the very pixels it is shown, the adapter would learn to copy the picture.
    """
    size = len(mask)
    scale, flip = rng.uniform(0.8, 1.2), rng.random() < 0.5
    x, y = (rng.uniform(-0.1, 0.1) * size for _ in range(2))
    across = -scale if flip else scale
    middle = size / 2
    form = (across, 0.0, middle - across * middle + x, 0.0, scale, middle - scale * middle + y)
    options: dict[str, Any] = {"resample": Image.Resampling.BILINEAR}
    moved = Image.fromarray(picture).transform((size, size), Image.Transform.AFFINE, form, fillcolor="white", **options)
    stencil = Image.fromarray(mask.astype(np.uint8) * 255)
    inside = np.asarray(stencil.transform((size, size), Image.Transform.AFFINE, form, fillcolor=0, **options)) > 127
    return (np.asarray(moved), inside) if inside.any() else (picture, mask)
