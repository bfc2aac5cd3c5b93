"""MoMA Text Encode, MoMA Mark Subject."""

from typing import Any

from comfy_api.latest import io, ui

from ..moma_modules.comfy_bridge.text import encode_prompt, mark_subject
from ..moma_modules.subject import Subject
from ..moma_modules.subject_tokens import PROMPT_TEMPLATE
from .types import CATEGORY, SEARCH_ALIASES, MomaSubject


class TextEncode(io.ComfyNode):
    """A positive conditioning that knows where the subject's tokens are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMATextEncode",
            display_name="MoMA Text Encode",
            category=CATEGORY,
            search_aliases=[*SEARCH_ALIASES, "prompt"],
            description="Encodes 'photo of a {subject}. {prompt}' and remembers where the subject is in it. Use it for "
            "the positive prompt; any text encoder will do for the negative one.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the SD1.5 checkpoint."),
                MomaSubject.Input("subject", tooltip="From Extract Subject Features or Load MoMA Subject."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="Empty: the prompt that the subject was extracted for. Another text works too, and saves a "
                    "run of the MLLM, but follows the prompt less closely.",
                ),
                io.String.Input(
                    "template",
                    default=PROMPT_TEMPLATE,
                    tooltip="The text around {subject} and {prompt}. MoMA was trained with the default.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For the sampler's positive input."
                ),
                io.String.Output("text", display_name="text", tooltip="The full prompt that was encoded."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, subject: Subject, prompt: str, template: str) -> io.NodeOutput:
        conditioning, text, warning = encode_prompt(clip, subject, prompt.strip() or subject.prompt, template)
        return io.NodeOutput(conditioning, text, ui=ui.PreviewText(warning) if warning else None)


class MarkSubject(io.ComfyNode):
    """One more subject in a text that is encoded already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAMarkSubject",
            display_name="MoMA Mark Subject",
            category=CATEGORY,
            search_aliases=[*SEARCH_ALIASES, "prompt", "two subjects"],
            description="Remembers where a subject is in a prompt that another node encoded: a second subject after "
            "MoMA Text Encode, or any subject after another text encoder. Chain it for more.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that the conditioning was encoded with."),
                MomaSubject.Input("subject", tooltip="The subject to find in the text."),
                io.Conditioning.Input("conditioning", tooltip="From MoMA Text Encode, or from CLIP Text Encode."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="The text that the conditioning was encoded from: the text output of MoMA Text Encode.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="For the sampler's positive input."
                ),
                io.String.Output("text", display_name="text", tooltip="The text, for the next MoMA Mark Subject."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, subject: Subject, conditioning: list, text: str) -> io.NodeOutput:
        positive, warning = mark_subject(clip, subject, conditioning, text)
        return io.NodeOutput(positive, text, ui=ui.PreviewText(warning) if warning else None)
