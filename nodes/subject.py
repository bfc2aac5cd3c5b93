"""Extract Subject Features, Save MoMA Subject, Load MoMA Subject."""

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..moma_modules.comfy_bridge import folders
from ..moma_modules.comfy_bridge.editor import show_text
from ..moma_modules.mllm.encode import subject_hidden_state
from ..moma_modules.pictures import coverage, what_was_seen
from ..moma_modules.reference_image import FITS, prepare_reference
from ..moma_modules.subject import Subject, load_subject, save_subject
from .types import CATEGORY, KEEPS_PREVIEW, SEARCH_ALIASES, MomaAdapter, MomaMllm, MomaSubject


class ExtractSubject(io.ComfyNode):
    """One forward of the MLLM over (reference, prompt) gives the subject embedding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAExtractSubject",
            display_name="Extract Subject Features",
            category=CATEGORY,
            search_aliases=SEARCH_ALIASES,
            description="Looks at the subject in the reference picture, with the word for it and the prompt in mind. "
            "The result depends on no seed or sampler: change those and this node does not run again. Its preview "
            "shows the mask on the picture, and what the language model sees: the subject on white.",
            inputs=[
                MomaMllm.Input("mllm", tooltip="From Load MoMA MLLM."),
                MomaAdapter.Input("adapter", tooltip="From Load MoMA Adapter."),
                io.Image.Input(
                    "image",
                    tooltip="One reference picture. Grey and transparent pictures are fine. It becomes 512x512.",
                ),
                io.String.Input(
                    "subject",
                    default="",
                    tooltip="The word or words for the subject, as in 'car' or 'stuffed animal'. Plain words that "
                    "describe the class work best.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the new picture should show, as in 'A car in autumn with falling leaves.' Say the "
                    "subject word in it.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="squash",
                    tooltip="How a non-square picture becomes square: squash (as the released code), pad with white, "
                    "or crop around the subject.",
                    advanced=True,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 on the subject; any size. Unconnected: the picture's transparency, or else the whole "
                    "picture. For the MASK of a cut-out PNG from Load Image, invert it first.",
                ),
            ],
            outputs=[
                MomaSubject.Output(
                    "subject",
                    display_name="subject",
                    tooltip="For MoMA Text Encode, Apply MoMA Adapter, Self-Attn Shortcut and Save MoMA Subject.",
                )
            ],
            **KEEPS_PREVIEW,
        )

    @classmethod
    def execute(
        cls, mllm: Any, adapter: Any, image: Any, subject: str, prompt: str, fit: str, mask: Any = None
    ) -> io.NodeOutput:
        word = " ".join(subject.split())
        if not word:
            raise ValueError("subject is empty: give the word for what is in the picture, as in 'car'.")
        if mllm.hidden_size != adapter.hidden_size:
            raise ValueError(
                f"adapter {adapter.name} takes hidden states of size {adapter.hidden_size}, but mllm {mllm.name} has "
                f"{mllm.hidden_size}: they do not belong together. Use both files of the MoMA release."
            )
        reference = prepare_reference(image, mask, fit)
        hidden = subject_hidden_state(mllm, reference.image.numpy(), reference.mask.numpy(), word, prompt)
        embedding = adapter.map_hidden_state(hidden)
        if not embedding.isfinite().all():
            raise ValueError(f"mllm {mllm.name} gave NaN for this picture and prompt; choose precision bf16 or fp32.")
        show_text(coverage(reference.mask))
        seen = what_was_seen(reference.image, reference.mask)
        subject_features = Subject(embedding, word, prompt, reference.image, reference.mask, adapter.identity)
        return io.NodeOutput(subject_features, ui=ui.PreviewImage(seen, cls=cls))


class SaveSubject(io.ComfyNode):
    """Writes a subject to one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMASaveSubject",
            display_name="Save MoMA Subject",
            category=CATEGORY,
            search_aliases=SEARCH_ALIASES,
            description="Saves a subject as one .safetensors file in output/moma_subjects. Load MoMA Subject brings it "
            "back without the MLLM.",
            inputs=[
                MomaSubject.Input("subject", tooltip="From Extract Subject Features."),
                io.String.Input(
                    "filename_prefix", default="subject", tooltip="May hold a subfolder, as in 'cars/red'."
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, subject: Subject, filename_prefix: str) -> io.NodeOutput:
        root = os.path.join(folder_paths.get_output_directory(), "moma_subjects")
        os.makedirs(root, exist_ok=True)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, root)
        filename = f"{name}_{counter:05}_.safetensors"
        save_subject(subject, Path(folder) / filename)
        saved = {"filename": filename, "subfolder": os.path.join("moma_subjects", subfolder), "type": "output"}
        return io.NodeOutput(ui={"moma_subjects": [saved]})


class LoadSubject(io.ComfyNode):
    """Reads a saved subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadSubject",
            display_name="Load MoMA Subject",
            category=CATEGORY,
            search_aliases=SEARCH_ALIASES,
            description="Loads a saved subject. No MLLM is needed.",
            inputs=[
                io.Combo.Input(
                    "subject_name",
                    options=folders.subject_names(),
                    tooltip="A file in output/moma_subjects or models/moma_subjects.",
                )
            ],
            outputs=[
                MomaSubject.Output(
                    "subject",
                    display_name="subject",
                    tooltip="For MoMA Text Encode, Apply MoMA Adapter and Self-Attn Shortcut.",
                ),
                io.String.Output("word", display_name="word", tooltip="The subject word(s) it was extracted with."),
                io.String.Output("prompt", display_name="prompt", tooltip="The prompt it was extracted for."),
            ],
        )

    @classmethod
    def validate_inputs(cls, subject_name: str) -> bool | str:
        try:
            folders.subject_path(subject_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, subject_name: str) -> str:
        status = os.stat(folders.subject_path(subject_name))
        return f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def execute(cls, subject_name: str) -> io.NodeOutput:
        subject = load_subject(folders.subject_path(subject_name))
        return io.NodeOutput(subject, subject.word, subject.prompt)
