"""MoMA Text Encode, MoMA Mark Subject."""

from typing import Any

from comfy_api.latest import io, ui

from ..moma_modules.host.messages import run_id, show_text, warn
from ..moma_modules.prompt.choices import choose, fingerprint, has_choice
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE
from ..moma_modules.prompt.text import EncodedPrompt, encode_prompt, mark_subject
from ..moma_modules.subject.subject import Subject
from .types import CATEGORY, MomaSubject


def prompt_input() -> io.Input:
    """The prompt of a node that encodes one for a subject."""
    return io.String.Input(
        "prompt",
        multiline=True,
        default="",
        tooltip="Empty: the prompt that the subject was extracted for. Another text works too, and saves a "
        "run of the MLLM, but follows the prompt less closely. Of {beach|city}, each run takes one.",
    )


class TextEncode(io.ComfyNode):
    """A positive conditioning that knows where the subject's tokens are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMATextEncode",
            display_name="MoMA Text Encode",
            category=CATEGORY,
            search_aliases=["prompt", "subject prompt", "CLIP text encode"],
            description="Encodes 'photo of a {subject}. {prompt}', remembers where the subject is in it and shows it "
            "in brackets. Use it for the positive prompt; any text encoder will do for the negative one.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the SD1.5 checkpoint."),
                MomaSubject.Input("subject", tooltip="From Extract Subject Features or Load MoMA Subject."),
                prompt_input(),
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
    def fingerprint_inputs(cls, prompt: str | None, template: str | None, **_: Any) -> str:
        return fingerprint(prompt, template)

    @classmethod
    def execute(cls, clip: Any, subject: Subject, prompt: str, template: str) -> io.NodeOutput:
        draw = subject.draw or run_id()
        prompt = choose(prompt.strip(), draw) or subject.prompt
        return _shown(encode_prompt(clip, subject, prompt, choose(template, draw)))


class MarkSubject(io.ComfyNode):
    """One more subject in a text that is encoded already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAMarkSubject",
            display_name="MoMA Mark Subject",
            category=CATEGORY,
            search_aliases=["two subjects", "several subjects", "subject in prompt"],
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
        if has_choice(text):
            warn(
                "MoMA: the text of MoMA Mark Subject holds a choice {a|b}, and the node that encoded it took one of "
                "its own. Connect the text output of MoMA Text Encode instead of writing the text again."
            )
        return _shown(mark_subject(clip, subject, conditioning, text))


def _shown(encoded: EncodedPrompt) -> io.NodeOutput:
    show_text(encoded.shown)
    if not encoded.found:
        warn(encoded.shown)
    return io.NodeOutput(encoded.conditioning, encoded.text, ui=ui.PreviewText(encoded.shown))
