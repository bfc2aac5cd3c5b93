"""Combine MoMA Subjects, Save MoMA Subject, Load MoMA Subject."""

import os

import folder_paths
from comfy_api.latest import io

from ..moma_modules.subject.file import (
    check_prefix,
    load_subject,
    pictures_path,
    save_numbered,
    subject_names,
    subject_path,
)
from ..moma_modules.subject.subject import Subject, combine_subjects
from .types import CATEGORY, MomaSubject


class CombineSubjects(io.ComfyNode):
    """Several references of one subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMACombineSubjects",
            display_name="Combine MoMA Subjects",
            category=CATEGORY,
            search_aliases=["multiple reference images", "several pictures", "merge subjects", "average"],
            description="Makes one subject from several pictures of the same thing: the features are averaged, and the "
            "shortcut looks at all pictures. Chain it for more than two.",
            inputs=[
                MomaSubject.Input("subject_a", tooltip="From Extract Subject Features, Load or Combine MoMA Subjects."),
                MomaSubject.Input("subject_b", tooltip="The same subject (same word, same adapter) in other pictures."),
            ],
            outputs=[MomaSubject.Output("subject", display_name="subject", tooltip="Used as any other subject.")],
        )

    @classmethod
    def execute(cls, subject_a: Subject, subject_b: Subject) -> io.NodeOutput:
        return io.NodeOutput(combine_subjects(subject_a, subject_b))


class SaveSubject(io.ComfyNode):
    """Writes a subject to one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMASaveSubject",
            display_name="Save MoMA Subject",
            category=CATEGORY,
            search_aliases=["export subject", "save embeds", "save character"],
            description="Saves a subject as one .safetensors file in output/moma_subjects. Load MoMA Subject brings it "
            "back without the MLLM.",
            inputs=[
                MomaSubject.Input("subject", tooltip="From Extract Subject Features."),
                io.String.Input(
                    "filename_prefix", default="subject", tooltip="May hold a subfolder, as in 'cars/red'."
                ),
                io.Boolean.Input(
                    "separate_pictures",
                    default=False,
                    optional=True,
                    tooltip="Keep picture and mask in a file beside it, which subjects of the same picture in that "
                    "folder share. For many subjects of few pictures.",
                    advanced=True,
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        try:
            check_prefix(filename_prefix or "subject")  # None: it comes from another node
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, subject: Subject, filename_prefix: str, separate_pictures: bool = False) -> io.NodeOutput:
        path = save_numbered(subject, filename_prefix, separate_pictures)
        place = {"subfolder": str(path.parent.relative_to(folder_paths.get_output_directory())), "type": "output"}
        shown = {"moma_subjects": [{"filename": path.name, **place}]}
        if beside := pictures_path(path):
            shown["moma_pictures"] = [{"filename": beside.name, **place}]
        return io.NodeOutput(ui=shown)


class LoadSubject(io.ComfyNode):
    """Reads a saved subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadSubject",
            display_name="Load MoMA Subject",
            category=CATEGORY,
            search_aliases=["saved subject", "load embeds", "import subject"],
            description="Loads a saved subject. No MLLM is needed.",
            inputs=[
                io.Combo.Input(
                    "subject_name",
                    options=subject_names(),
                    tooltip="A file in output/moma_subjects or models/moma_subjects; striped_cup is part of this pack.",
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
    def validate_inputs(cls, subject_name: str | None = None) -> bool | str:
        if subject_name is None:  # linked, to be seen when it runs
            return True
        try:
            subject_path(subject_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, subject_name: str | None) -> str:
        if subject_name is None:  # linked
            return ""
        status = os.stat(subject_path(subject_name))
        return f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def execute(cls, subject_name: str) -> io.NodeOutput:
        subject = load_subject(subject_path(subject_name))
        return io.NodeOutput(subject, subject.word, subject.prompt)
