"""What a run knows of its place in the picture and of the runs before it, and what the user is told of that."""

import logging
from typing import Any

import torch
from torch import Tensor

from .conditioning import TOKENS_KEY, positives_of
from .editor import executing_node, show_text
from .sequence import GOES_ON, PART, Trace
from .settings import Settings, SubjectSettings
from .whereabouts import CROPS, PICTURE, TILES, Whereabouts, box_in, kind_of_node, prompted_area

_LOG = logging.getLogger("comfyui_moma")
_LOG.setLevel(logging.WARNING)
"""Of its own: UltimateSDUpscale turns the root logger off while it works."""

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

    def prepare(self, conds: dict[str, list[dict[str, Any]]], settings: Settings, noise: Tensor) -> None:
        """With the prompts processed: find out where the run is, and tell what follows from it."""
        positives = positives_of(conds)
        keys = [entry.subject.key for entry in settings.subjects]
        knowing = {key: [cond for cond in positives if cond.get(TOKENS_KEY, {}).get(key)] for key in keys}
        areas = {key: prompted_area(found, noise) for key, found in knowing.items()}
        kind, box = kind_of_node(self._class), box_in(positives)
        batch = box not in (None, PICTURE) and noise.shape[0] > 1
        if box == PICTURE:
            kind, box = None, None
        elif box is not None:
            kind = TILES
        if batch:  # what a pack crops, it crops for the first tile
            box, areas = None, {}
        self.where = Whereabouts(kind, box, {key: area for key, area in areas.items() if area is not None})
        for entry in settings.subjects:
            self._tell_of(entry, batch, known=bool(knowing[entry.subject.key]))

    def masks_before(self, keys: list[str], canvas: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """[S, B, H, W]: the last masks of the run that this one goes on with; None if there is none."""
        masks = {} if self._before is None else self._before.masks
        if any(key not in masks or tuple(masks[key].shape) != canvas for key in keys):
            return None
        return torch.stack([masks[key] for key in keys]).to(device)

    def end(self, samples: Tensor, masks: dict[str, Tensor], evaluations: int) -> None:
        """The run is done: leave a trace for those that follow in the same execution of the node."""
        if evaluations == 1 and self._trace.end > 0 and self._before is None and self.where.kind is None:
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

    def _tell_of(self, entry: SubjectSettings, batch: bool, known: bool) -> None:
        where, word, key = self.where, entry.subject.word, entry.subject.key
        tokens, shortcut = entry.image_tokens, entry.shortcut
        parts: list[Any] = [] if tokens is None or tokens.weight == 0 else [tokens]
        parts += [] if shortcut is None or shortcut.strength == 0 else [shortcut]
        if key in where.prompted or not parts:
            return
        if not any(where.is_out(part, key) for part in parts):
            if known and (where.kind == CROPS or (where.kind is None and self._relation == PART)):
                self._tell(
                    f"MoMA: {self._name} works on several pictures or parts of one, and MoMA looks for the subject "
                    f"{word!r} in each, whether it is there or not; a region_mask is taken for each as for the whole "
                    f"picture. Where that is not meant: {_SET_MASK[0].lower()}{_SET_MASK[1:]}"
                )
            return
        if where.box is not None:
            reason, advice = "nothing says where in the picture the subject is", _REGION
        elif batch:
            reason, advice = "in a batch it tells the place of the first one only", "Set its batch_size to 1."
        else:
            reason, advice = "it does not tell where they are in it", _SET_MASK
        self._tell(
            f"MoMA: {self._name} works on {where.kind} of the picture, and {reason}: the subject {word!r} stays out of "
            f"them. {advice}"
        )

    def _tell(self, text: str) -> None:
        """Once for an execution of a node."""
        self._trace.told.add(text)
        if text not in self._trace.said:
            self._trace.said.add(text)
            _LOG.warning(text)
            show_text(text)
