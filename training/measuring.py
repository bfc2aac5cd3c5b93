"""What measures in the small world, as backbones of `moma_batch evaluate`: the probe's features, and plain colours."""

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..moma_batch.evaluate.backbones import Backbone
from .data import to_tensor
from .description import NAMED
from .drawn import looks
from .probe import FILE, load
from .words import MATERIAL_WORDS, PLACE_WORDS, SYNONYMS
from .world import SIDE

_SAID: dict[str, Mapping[str, Sequence[str]]] = {"class": SYNONYMS, "place": PLACE_WORDS, "material": MATERIAL_WORDS}
"""What a prompt says, and in which words."""
_BINS = 6
_FILLED, _CUT_OUT = 0.85, 0.7
"""Of a picture's side: what the painter's subjects never cover; and what they cover on average, at which one that was
cut out is shown."""


class _Probe:
    """The probe with one part of what it reads."""

    def __init__(self, part: str) -> None:
        self._probe = load()
        digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
        self.name = f"probe-{part} {digest[:8]}"
        self.about = {"model": FILE.name, "sha256": digest}

    def _read(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        sized = [_as_painted(picture) for picture in pictures]
        with torch.inference_mode():
            reading = self._probe(torch.stack([to_tensor(np.asarray(picture)) for picture in sized]))
        # Roots of shares: what is read of each has length 1, so that doubt of what no text asked for changes no cosine.
        words = [reading.named[name].softmax(dim=1).sqrt() for name in _SAID]
        return {"looks": looks(reading), "words": torch.cat(words, dim=1)}


def _as_painted(picture: Image.Image) -> Image.Image:
    """At the side of the small world.

    A subject that was cut out fills its picture, larger than the probe ever saw one: read so, painted pictures of one
    subject have a likeness of 0.95, and of 0.99 at the size that they are painted at (48 pairs).
    """
    box = ImageOps.invert(picture.convert("L")).getbbox() or (0, 0, 0, 0)
    inside = min(box[:2]) > 0 and box[2] < picture.width and box[3] < picture.height
    filled = inside and max(box[2] - box[0], box[3] - box[1]) > _FILLED * picture.width
    side = round(SIDE * _CUT_OUT) if filled else SIDE
    shown = Image.new("RGB", (SIDE, SIDE), "white")
    shown.paste(picture.resize((side, side), Image.Resampling.BICUBIC), ((SIDE - side) // 2,) * 2)
    return shown


class ProbeLooks(_Probe):
    """What tells subjects apart: class, pattern, colours, shape."""

    image_measure, text_measure = "probe-I", ""

    def __init__(self) -> None:
        """Load the published probe."""
        super().__init__("looks")

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """See `Backbone`."""
        return self._read(pictures)["looks"]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """There are none: no text says how a subject looks."""
        raise NotImplementedError


class ProbeWords(_Probe):
    """What a prompt can ask for: class, place, material."""

    image_measure, text_measure = "probe-W", "probe-T"

    def __init__(self) -> None:
        """Load the published probe."""
        super().__init__("words")

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """See `Backbone`."""
        return self._read(pictures)["words"]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """A one for each thing that a text says; what it leaves open counts for nothing."""
        rows = []
        for text in texts:
            row = []
            for kind, words in _SAID.items():
                said = next((name for name, ways in words.items() if any(_says(text, way) for way in ways)), "")
                row += [float(value == said) for value in NAMED[kind]]
            rows.append(row)
        return torch.tensor(rows)


class Colours:
    """Histograms of colours, less what is white: their cosine is a likeness that no network has a part in."""

    name, image_measure, text_measure = "colours", "colours-I", ""

    def __init__(self) -> None:
        """Nothing to load."""
        self.about = {"model": f"{_BINS} bins a channel, square roots of shares"}

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """See `Backbone`; cosines of square roots are Bhattacharyya's coefficient."""
        rows = []
        for picture in pictures:
            pixels = np.asarray(picture).reshape(-1, 3)
            pixels = pixels[(pixels < 255).any(axis=1)]
            bins = (pixels.astype(int) * _BINS) // 256
            counts = np.bincount(bins @ np.array([_BINS * _BINS, _BINS, 1]), minlength=_BINS**3)
            rows.append(np.sqrt(counts / max(1, len(pixels))))
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """There are none."""
        raise NotImplementedError


def _says(text: str, way: str) -> bool:
    return re.search(rf"\b{re.escape(way)}\b", text) is not None


def backbones() -> list[Backbone]:
    """All of them; the last has no part in the probe."""
    return [ProbeWords(), ProbeLooks(), Colours()]
