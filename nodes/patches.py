"""Apply MoMA Subject, Apply MoMA Adapter, Self-Attn Shortcut."""

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..moma_modules.adapter.loading import Adapter
from ..moma_modules.prompt.choices import fingerprint
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE
from ..moma_modules.sampling.patching import settings_of
from ..moma_modules.sampling.reference import encode_reference
from ..moma_modules.sampling.settings import ImageTokens, Settings, Shortcut, Window
from ..moma_modules.sampling.unet import check_model
from ..moma_modules.sampling.wrappers import patched
from ..moma_modules.subject.subject import Subject
from .conditioning import TextEncode, prompt_input
from .types import CATEGORY, MomaAdapter, MomaSubject

SHORTCUT_START = 0.05
"""MoMA leaves out so much of the noise schedule."""


def _window_inputs(start: float, start_tooltip: str) -> list[io.Input]:
    return [
        io.Float.Input(
            "start_percent", default=start, min=0.0, max=1.0, step=0.001, tooltip=start_tooltip, advanced=True
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Fraction of the noise schedule (0..1) after which it stops.",
            advanced=True,
        ),
    ]


def _region_input() -> io.Input:
    return io.Mask.Input(
        "region_mask",
        optional=True,
        tooltip="Where in the new picture the subject may appear, 1 = yes; any size; one, or one per picture. "
        "Works together with the automatic subject mask.",
    )


def _window(start_percent: float, end_percent: float, region_mask: torch.Tensor | None) -> Window:
    if start_percent > end_percent:
        raise ValueError(f"start_percent {start_percent} is after end_percent {end_percent}.")
    if region_mask is None:
        return Window(start_percent, end_percent)
    region = region_mask if region_mask.ndim == 3 else region_mask.reshape(-1, *region_mask.shape[-2:])
    if region.numel() == 0 or not region.isfinite().all():
        raise ValueError(f"region_mask is empty or holds NaN (shape {tuple(region_mask.shape)}).")
    return Window(start_percent, end_percent, region.detach().to("cpu", torch.float32).clamp(0, 1))


def _check(model: Any, adapter: Adapter, subject: Subject) -> Settings:
    check_model(model, adapter)
    if subject.adapter_identity != adapter.identity:
        raise ValueError(
            f"subject was extracted with another adapter ({subject.adapter_identity[:12]}) than {adapter.name} "
            f"({adapter.identity[:12]}). Load that adapter, or extract the subject again with this one."
        )
    if subject.embedding.shape[1] != adapter.sizes.embedding:
        raise ValueError(
            f"subject has an embedding of size {subject.embedding.shape[1]}, adapter {adapter.name} takes "
            f"{adapter.sizes.embedding}. Extract the subject again with this adapter."
        )
    return settings_of(model) or Settings()


def _weight_input(advanced: bool = False) -> io.Input:
    return io.Float.Input(
        "weight",
        default=1.0,
        min=0.0,
        max=3.0,
        step=0.05,
        tooltip="How strongly the features act. 1.0 is what MoMA was trained with; less gives the text of "
        "the prompt more say, much more makes the picture ignore it. 0 is off.",
        advanced=advanced,
    )


def _strength_input() -> io.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=2.0,
        step=0.05,
        tooltip="1.0 for the same subject in a new context, at most 1.2: beyond, the reference overrides "
        "the prompt. 0.4 for a new texture or material, at most 0.6: beyond, the old one stays. 0 is off.",
    )


def _shortcut(
    adapter: Adapter, subject: Subject, vae: Any, clip: Any, strength: float, window: Window, seed: int
) -> Shortcut:
    encoded = encode_reference(adapter, subject, vae, clip)
    return Shortcut(
        latent=encoded.latent,
        text=encoded.text,
        noise=torch.randn(encoded.latent.shape, generator=torch.Generator().manual_seed(seed)),
        strength=strength,
        window=window,
    )


class ApplyAdapter(io.ComfyNode):
    """Cross-attention to the subject's image tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAApplyAdapter",
            display_name="Apply MoMA Adapter",
            category=CATEGORY,
            search_aliases=["apply IPAdapter", "subject weight", "cross attention", "region mask"],
            description="Lets the model see the subject's features (decoupled cross-attention). It carries what the "
            "subject is; Self-Attn Shortcut carries its details.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, with or without LoRAs."),
                MomaAdapter.Input("adapter", tooltip="From Load MoMA Adapter or Load MoMA."),
                MomaSubject.Input("subject", tooltip="From Extract Subject Features or Load MoMA Subject."),
                _weight_input(),
                *_window_inputs(0.0, "Fraction of the noise schedule (0..1) from which it acts."),
                _region_input(),
                io.Boolean.Input(
                    "show_mask",
                    default=False,
                    optional=True,
                    tooltip="Shows the subject mask on this node while the sampler runs, a few times a second at most. "
                    "The picture stays the same.",
                    advanced=True,
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", display_name="model", tooltip="For the sampler, or for more patches.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Adapter,
        subject: Subject,
        weight: float,
        start_percent: float,
        end_percent: float,
        region_mask: torch.Tensor | None = None,
        show_mask: bool = False,
    ) -> io.NodeOutput:
        settings = _check(model, adapter, subject)
        show_on = cls.hidden.unique_id if show_mask else None
        part = ImageTokens(weight, _window(start_percent, end_percent, region_mask), show_on)
        return io.NodeOutput(patched(model, settings.with_subject(subject, adapter, image_tokens=part)))


class SelfAttnShortcut(io.ComfyNode):
    """Self-attention to the reference picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMASelfAttnShortcut",
            display_name="Self-Attn Shortcut",
            category=CATEGORY,
            search_aliases=["MoMA", "self attention", "reference only", "subject details", "style strength", "texture"],
            description="Carries the subject's details: the model also attends to the reference picture itself, looked "
            "at once at the start of each run.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, before or after Apply MoMA Adapter."),
                MomaAdapter.Input("adapter", tooltip="From Load MoMA Adapter or Load MoMA."),
                MomaSubject.Input("subject", tooltip="From Extract Subject Features or Load MoMA Subject."),
                io.Vae.Input("vae", tooltip="The VAE of the SD1.5 checkpoint; encodes the reference pictures."),
                io.Clip.Input("clip", tooltip="The CLIP of the SD1.5 checkpoint; encodes the subject word."),
                _strength_input(),
                *_window_inputs(
                    SHORTCUT_START,
                    "Fraction of the noise schedule (0..1) from which it acts. MoMA leaves out the first 0.05.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    # The editor would choose another after each run, and each run would look at the reference again.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the slight noise that the reference picture gets. It hardly matters: keep it.",
                    advanced=True,
                ),
                _region_input(),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="For the sampler, or for more patches.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Adapter,
        subject: Subject,
        vae: Any,
        clip: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        seed: int,
        region_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        settings = _check(model, adapter, subject)
        window = _window(start_percent, end_percent, region_mask)
        part = _shortcut(adapter, subject, vae, clip, strength, window, seed)
        return io.NodeOutput(patched(model, settings.with_subject(subject, adapter, shortcut=part)))


class ApplySubject(io.ComfyNode):
    """Both parts of MoMA and the prompt at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAApplySubject",
            display_name="Apply MoMA Subject",
            category=CATEGORY,
            search_aliases=[
                "IPAdapter",
                "image prompt",
                "personalize",
                "identity",
                "consistent character",
                "keep character",
                "subject prompt",
            ],
            description="One subject and one prompt in one node: what MoMA Text Encode, Apply MoMA Adapter and "
            "Self-Attn Shortcut do with their default settings. Use those for more subjects in one prompt, ranges of "
            "the noise schedule, or only one of the parts.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 model, with or without LoRAs."),
                io.Clip.Input("clip", tooltip="The CLIP of the SD1.5 checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the SD1.5 checkpoint; encodes the reference pictures."),
                MomaSubject.Input("subject", tooltip="From Extract Subject Features or Load MoMA Subject."),
                prompt_input(),
                _strength_input(),
                _weight_input(advanced=True),
                _region_input(),
                MomaAdapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="For a saved subject only, from Load MoMA Adapter or Load MoMA; others bring theirs along.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For the sampler, or for more patches."),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For the sampler's positive input."
                ),
                io.String.Output("text", display_name="text", tooltip="The full prompt that was encoded."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, prompt: str | None, **_: Any) -> str:
        return fingerprint(prompt)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject: Subject,
        prompt: str,
        strength: float,
        weight: float,
        region_mask: torch.Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> io.NodeOutput:
        adapter = adapter or subject.adapter
        if adapter is None:
            raise ValueError(
                "adapter: a saved subject does not bring its adapter along. Connect Load MoMA Adapter to `adapter`."
            )
        encoded = TextEncode.execute(clip, subject, prompt, PROMPT_TEMPLATE)
        settings = _check(model, adapter, subject)
        window = Window() if region_mask is None else _window(0.0, 1.0, region_mask)
        shortcut = _shortcut(adapter, subject, vae, clip, strength, replace(window, start=SHORTCUT_START), seed=0)
        tokens = ImageTokens(weight, window)
        settings = settings.with_subject(subject, adapter, image_tokens=tokens, shortcut=shortcut)
        return io.NodeOutput(patched(model, settings), *encoded.args, ui=encoded.ui)
