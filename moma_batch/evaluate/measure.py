"""The figures of a batch of pictures by one backbone: likeness, prompt and mask, as cosines of embeddings."""

import base64
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .backbones import Backbone
from .images import Views
from .samples import Sample

SUBJECT, COPY, MASK = " subject", " copy", " mask"
"""What a measure's name has behind it: of the subject alone against white; the copy check; how the mask divides."""
_KEPT = 1024
"""References whose embeddings are kept."""


@dataclass(frozen=True)
class Shown:
    """A sample with its pictures in memory.

    Attributes:
        reference: Views of the reference; `reference_key` names them.
        mask_figures: Of the found mask, without a network.
    """

    sample: Sample
    picture: Views
    reference: Views
    reference_key: str
    mask_figures: dict[str, float]


@dataclass(frozen=True)
class Embedded:
    """Views as unit vectors [D]; None where there is no view."""

    whole: Tensor
    subject: Tensor | None
    around: Tensor | None


@dataclass(frozen=True)
class Measured:
    """The figures of one picture, and what the copy check needs of it later."""

    figures: dict[str, float]
    around: Tensor | None
    reference: Embedded


class Measure:
    """One backbone at work, with the embeddings of the references that it saw last."""

    def __init__(self, backbone: Backbone) -> None:
        """Nothing seen yet."""
        self.backbone = backbone
        self._references: OrderedDict[str, Embedded] = OrderedDict()

    def batch(self, shown: Sequence[Shown]) -> list[Measured]:
        """The figures of some pictures, in one batch with the references that are new."""
        new = {one.reference_key: one.reference for one in shown if one.reference_key not in self._references}
        embedded = self._embed([*(one.picture for one in shown), *new.values()])
        self._references |= zip(new, embedded[len(shown) :], strict=True)
        references = [self._references[one.reference_key] for one in shown]
        for one in shown:
            self._references.move_to_end(one.reference_key)
        while len(self._references) > _KEPT:
            self._references.popitem(last=False)
        texts: list[Tensor | None] = [None] * len(shown)
        if self.backbone.text_measure:
            texts = list(_unit(self.backbone.texts([one.sample.prompt for one in shown])))
        found = []
        for one, picture, reference, text in zip(shown, embedded, references, texts, strict=False):
            figures = one.mask_figures | self._figures(picture, reference, text)
            found.append(Measured(figures, picture.around, reference))
        return found

    def _embed(self, all_views: Sequence[Views]) -> list[Embedded]:
        pictures: list[Image.Image] = []
        for each in all_views:
            pictures += [view for view in (each.whole, each.subject, each.around) if view is not None]
        vectors = iter(_unit(self.backbone.images(pictures)))
        found = []
        for each in all_views:
            whole = next(vectors)
            subject, around = (None if view is None else next(vectors) for view in (each.subject, each.around))
            found.append(Embedded(whole, subject, around))
        return found

    def _figures(self, picture: Embedded, reference: Embedded, text: Tensor | None) -> dict[str, float]:
        likeness, prompt = self.backbone.image_measure, self.backbone.text_measure
        found = {likeness: _cosine(picture.whole, reference.whole)}
        if text is not None:
            found[prompt] = _cosine(picture.whole, text)
        if picture.subject is not None and text is not None:
            found[prompt + SUBJECT] = _cosine(picture.subject, text)
        if picture.subject is not None and reference.subject is not None:
            found[likeness + SUBJECT] = _cosine(picture.subject, reference.subject)
            if picture.around is not None:
                found[likeness + MASK] = found[likeness + SUBJECT] - _cosine(picture.around, reference.subject)
        return found


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _cosine(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum())


def to_text(vector: Tensor) -> str:
    """A vector [D] in half precision as a line of JSON can hold it."""
    return base64.b64encode(vector.numpy().astype("<f2").tobytes()).decode("ascii")


def from_text(text: str) -> np.ndarray[Any, Any]:
    """See `to_text`; [D] in double precision."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)
