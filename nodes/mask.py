"""MoMA Subject Mask."""

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ..moma_modules.host.pictures import film_strip
from ..moma_modules.sampling.patching import settings_of
from ..moma_modules.sampling.settings import Settings
from ..moma_modules.subject.run_log import CAPACITY, MOST_RUNS, FoundRun
from ..moma_modules.subject.subject import Subject
from .types import CATEGORY, MomaSubject

PIXELS_PER_LATENT = 8


class SubjectMask(io.ComfyNode):
    """The automatic mask of a finished run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMASubjectMask",
            display_name="MoMA Subject Mask",
            category=CATEGORY,
            search_aliases=["attention map", "attention mask", "heatmap", "where the subject is"],
            description="Shows where the model put the subject: the mask that MoMA found while the sampler ran, and "
            "how that mask formed.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the sampler got."),
                io.Latent.Input("latent", tooltip="The LATENT that the sampler gave."),
                MomaSubject.Input(
                    "subject", optional=True, tooltip="With several subjects, the one to show. Unconnected: all."
                ),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="0..1, in the size of the picture."),
                io.Image.Output(
                    "evolution",
                    display_name="evolution",
                    tooltip="The mask over the run, with the number of the model evaluation above each; of a batch "
                    "one row per picture.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any], subject: Subject | None = None) -> io.NodeOutput:
        settings = settings_of(model)
        if settings is None:
            raise ValueError(
                "model has no MoMA on it: the nodes that put it there are bypassed or muted, or it is another MODEL. "
                "Turn on Apply MoMA Subject, Apply MoMA Adapter or Self-Attn Shortcut and connect its MODEL; to run "
                "without MoMA, bypass MoMA Subject Mask too."
            )
        run = _find(settings, latent["samples"])
        if subject is not None and subject.key not in run.masks:
            if any(entry.subject.key == subject.key for entry in settings.subjects):
                raise ValueError(
                    f"subject {subject.word!r} was not in the run that made this latent: connect the LATENT of a "
                    "sampler that ran with it."
                )
            raise ValueError(
                f"subject {subject.word!r} is not one of the subjects of this model: the nodes that put it there are "
                "bypassed or muted, or it is another MODEL. Turn them on, or leave `subject` unconnected for the mask "
                "of all subjects there are."
            )
        keys = list(run.masks) if subject is None else [subject.key]
        mask = _joined(run.masks, keys)
        picture = interpolate(mask[:, None], scale_factor=PIXELS_PER_LATENT, mode="bilinear")[:, 0]
        strip = _evolution(run, keys)
        shown = [*ui.PreviewMask(picture, cls=cls).values, *ui.PreviewImage(strip, cls=cls).values]
        return io.NodeOutput(picture, strip, ui={"images": shown, "animated": (False,)})


def _find(settings: Settings, samples: torch.Tensor) -> FoundRun:
    logs = [entry.subject.runs for entry in settings.subjects]
    for log in logs:
        if (run := log.find(samples)) is not None:
            return run
    if any(log.dropped(samples) for log in logs):
        raise ValueError(
            "latent is of a run whose mask was dropped: of each subject MoMA keeps the last "
            f"{MOST_RUNS} runs, {CAPACITY >> 20} MB at most. Run the sampler again: change its seed, or choose "
            "'Unload Models and Execution Cache' and queue once more, with fewer runs between."
        )
    raise ValueError(
        "latent is not the result of a sampler that ran with this model. Connect the LATENT straight from the sampler "
        "(of SamplerCustomAdvanced: `output`, not `denoised_output`), and the MODEL that it got. A LATENT from a file, "
        "or of a run before its subject was loaded anew, is not known either: run the sampler again."
    )


def _joined(masks: dict[str, torch.Tensor], keys: list[str]) -> torch.Tensor:
    """[B, h, w]: where any of the subjects is."""
    return torch.stack([masks[key] for key in keys]).amax(dim=0)


def _evolution(run: FoundRun, keys: list[str]) -> torch.Tensor:
    return film_strip([(f"{number}", _joined(masks, keys)) for number, masks in run.film])
