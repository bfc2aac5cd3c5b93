"""What a run knows of its place in the picture and of the runs before it, and what the user is told of that."""

from typing import Any

import torch
from torch import Tensor

from ..host.messages import executing_node, show_text, warn
from ..prompt.marks import PICTURE, TOKENS_KEY, box_in
from .rows import positives_of
from .settings import Settings, SubjectSettings
from .whereabouts import CROPS, GOES_ON, PART, TILES, Trace, Whereabouts, crops_maps, kind_of_node, prompted_area

_WITHOUT = "or connect a MODEL without MoMA to it."
_SET_MASK = (
    "Say it with the prompt: give the prompt with the subject to Conditioning (Set Mask), or (Set Area) where the node "
    f"does not take masks, and combine it with one that does not have the subject; {_WITHOUT}"
)
_REGION = (
    "Connect the mask of MoMA Subject Mask, of the run that made the picture, to region_mask of Apply MoMA Adapter and "
    f"Self-Attn Shortcut on this MODEL; {_WITHOUT}"
)


class Placing:
    """Of one run.

    Attributes:
        where: Set by `prepare`.
    """

    def __init__(self, settings: Settings, latent: Tensor, sigmas: Tensor) -> None:
        """Before the run: its latent [B, C, h, w] as the sampler got it, and its noise levels."""
        self._logs = [entry.subject.runs for entry in settings.subjects]
        node, self._class = executing_node()
        self._trace = Trace.begun(node, latent, sigmas)
        before = self._logs[0].latest if self._logs else None
        self._relation = self._trace.after(before)
        self._before = before if self._relation == GOES_ON else None
        self._name = f"the node {self._class}" if self._class else "a node"
        self.where = Whereabouts()
        self._unbounded = False

    def prepare(self, conds: dict[str, list[dict[str, Any]]], settings: Settings, noise: Tensor) -> None:
        """With the prompts processed: find out where the run is, and tell what follows from it."""
        positives = positives_of(conds)
        keys = [entry.subject.key for entry in settings.subjects]
        knowing = {key: [cond for cond in positives if cond.get(TOKENS_KEY, {}).get(key)] for key in keys}
        areas = {key: prompted_area(found, noise) for key, found in knowing.items()}
        kind, box = kind_of_node(self._class), box_in(positives)
        batch = box not in (None, PICTURE) and noise.shape[0] > 1
        if box == PICTURE:  # from other nodes it is a mere copy of the map
            kind, box = None if crops_maps(self._class) else kind, None
        elif box is not None:
            kind = TILES
        if batch:  # what a pack crops, it crops for the first tile
            box, areas = None, {}
        self.where = Whereabouts(kind, box, {key: area for key, area in areas.items() if area is not None})
        for entry in settings.subjects:
            key, parts = entry.subject.key, _acting(entry)
            if parts and key not in self.where.prompted:
                regions = [part.window.region for part in parts.values()]
                self._unbounded |= bool(knowing[key]) and any(region is None for region in regions)
                self._tell_of(entry, parts, batch, known=bool(knowing[key]))

    def masks_before(self, keys: list[str], canvas: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """[S, B, H, W]: the last masks of the run that this one goes on with; None if there is none."""
        masks = {} if self._before is None else self._before.masks
        if any(key not in masks or tuple(masks[key].shape) != canvas for key in keys):
            return None
        return torch.stack([masks[key] for key in keys]).to(device)

    def end(self, samples: Tensor, masks: dict[str, Tensor], evaluations: int) -> None:
        """The run is done: leave a trace for those that follow in the same execution of the node."""
        alone = self._before is None and self.where.kind is None
        if evaluations == 1 and self._trace.end > 0 and alone and self._unbounded:
            self._tell(
                f"MoMA: {self._name} stopped after one evaluation of the model. The automatic mask acts from the "
                "second one on, so here the subject's features reached the whole picture. Sample more steps at once, "
                "or give the subject a region_mask."
            )
        if self._trace.said:  # what came since has taken its place on the node
            show_text("\n".join(sorted(self._trace.said)))
        self._trace.end_with(samples, masks)
        for log in self._logs:
            log.latest = self._trace

    def _tell_of(self, entry: SubjectSettings, parts: dict[str, Any], batch: bool, known: bool) -> None:
        where, word = self.where, entry.subject.word
        out = [name for name, part in parts.items() if where.is_out(part, entry.subject.key)]
        acting = [name for name in parts if name not in out]
        if acting and not known and where.kind != TILES:
            self._tell(
                f"MoMA: no positive prompt of this run knows where the subject {word!r} is, so its features reach the "
                "whole picture. Encode it with MoMA Text Encode and say its word in the prompt, or add MoMA Mark "
                "Subject."
            )
        if out:
            stays = f"the subject {word!r} stays out of them"
            if acting:
                stays = f"what {out[0]} adds of {stays}, while {acting[0]} acts"
            self._tell(f"MoMA: {self._name} works on {where.kind} of the picture, and {self._reason(batch, stays)}")
        elif known and (where.kind == CROPS or (where.kind is None and self._relation == PART)):
            region = "would keep it out" if where.kind == CROPS else "is taken for each as for the whole picture"
            self._tell(
                f"MoMA: {self._name} works on several pictures or parts of one, and MoMA looks for the subject "
                f"{word!r} in each, whether it is there or not; a region_mask {region}. Where that is not meant: "
                f"{_SET_MASK[0].lower()}{_SET_MASK[1:]}"
            )

    def _reason(self, batch: bool, stays: str) -> str:
        """Why subjects cannot be placed, with what follows from it and what to do."""
        if self.where.box is not None:
            return f"nothing says where in the picture the subject is: {stays}. {_REGION}"
        if batch:
            return f"in a batch it tells the place of the first one only: {stays}. Set its batch_size to 1."
        region = ", which a region_mask needs" if self.where.kind == CROPS else ""
        return f"it does not tell where they are in it{region}: {stays}. {_SET_MASK}"

    def _tell(self, text: str) -> None:
        """Once for an execution of a node."""
        self._trace.told.add(text)
        if text not in self._trace.said:
            self._trace.said.add(text)
            warn(text)
            show_text(text)


def _acting(entry: SubjectSettings) -> dict[str, Any]:
    """The parts of a subject that are on, by the node that sets them."""
    tokens, shortcut = entry.image_tokens, entry.shortcut
    parts: dict[str, Any] = {}
    if tokens is not None and tokens.weight != 0:
        parts["Apply MoMA Adapter"] = tokens
    if shortcut is not None and shortcut.strength != 0:
        parts["Self-Attn Shortcut"] = shortcut
    return parts
