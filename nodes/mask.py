"""MoMA Subject Mask."""

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ..moma_modules.comfy_bridge.patching import settings_of
from ..moma_modules.subject import Subject
from .types import CATEGORY, SEARCH_ALIASES, MomaSubject

PIXELS_PER_LATENT = 8


class SubjectMask(io.ComfyNode):
    """The automatic mask of a finished run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMASubjectMask",
            display_name="MoMA Subject Mask",
            category=CATEGORY,
            search_aliases=SEARCH_ALIASES,
            description="Shows where the model put the subject: the mask that MoMA found while the sampler ran.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the sampler got."),
                io.Latent.Input("latent", tooltip="The LATENT that the sampler gave."),
                MomaSubject.Input(
                    "subject", optional=True, tooltip="With several subjects, the one to show. Unconnected: all."
                ),
            ],
            outputs=[io.Mask.Output("mask", display_name="mask", tooltip="0..1, in the size of the picture.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any], subject: Subject | None = None) -> io.NodeOutput:
        settings = settings_of(model)
        if settings is None:
            raise ValueError("model has no MoMA on it: connect the MODEL that Apply MoMA Adapter or Shortcut gave.")
        masks = settings.log.find(latent["samples"])
        if masks is None:
            raise ValueError(
                "latent is not the result of a sampler that ran with this model. Connect the LATENT straight from the "
                "sampler, and the MODEL that this sampler got."
            )
        if subject is not None and subject.key not in masks:
            raise ValueError(f"subject {subject.word!r} is not one of the subjects of this model.")
        chosen = list(masks.values()) if subject is None else [masks[subject.key]]
        mask = torch.stack(chosen).amax(dim=0)
        picture = interpolate(mask[:, None], scale_factor=PIXELS_PER_LATENT, mode="bilinear")[:, 0]
        return io.NodeOutput(picture, ui=ui.PreviewMask(picture, cls=cls))
