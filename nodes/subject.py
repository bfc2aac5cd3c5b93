"""Extract Subject Features, Combine MoMA Subjects, Save MoMA Subject, Load MoMA Subject."""

import os
from typing import Any
from unicodedata import normalize

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..moma_modules.adapter.loading import Adapter
from ..moma_modules.download.release import ADAPTER_NAME, FOLDER
from ..moma_modules.host.folders import OWN_ADAPTER, OWN_MLLM, user_folder
from ..moma_modules.host.messages import run_id, show_text
from ..moma_modules.host.pictures import coverage, what_was_seen
from ..moma_modules.mllm.encode import subject_hidden_state
from ..moma_modules.mllm.hidden_state_cache import HIDDEN_STATES, HiddenStateCache
from ..moma_modules.mllm.loading import Mllm
from ..moma_modules.prompt.choices import choose, fingerprint, has_choice
from ..moma_modules.prompt.clip_tokens import visible
from ..moma_modules.prompt.text import check_characters, plain_text
from ..moma_modules.subject.file import (
    check_prefix,
    load_subject,
    pictures_path,
    save_numbered,
    subject_names,
    subject_path,
)
from ..moma_modules.subject.reference_image import FITS, prepare_references
from ..moma_modules.subject.reference_mask import DEFAULT_THRESHOLD
from ..moma_modules.subject.subject import Subject, combine_subjects
from .types import CATEGORY, KEEPS_PREVIEW, MomaAdapter, MomaMllm, MomaSubject

NO_PICTURE = (
    "image has no picture: Load MoMA Checkpoint has an example for the small checkpoint only. Unmute the Load Image "
    "before it (select it, Ctrl+M), or connect one, and paint the mask there."
)


class ExtractSubject(io.ComfyNode):
    """One forward of the MLLM over (reference, prompt) gives the subject embedding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAExtractSubject",
            display_name="Extract Subject Features",
            category=CATEGORY,
            search_aliases=[
                "MoMA",
                "reference image",
                "image to subject",
                "encode reference",
                "subject encode",
                "LLaVA prompt",
            ],
            description="Looks at the subject in the reference picture, with the word for it and the prompt in mind. "
            "The result depends on no seed or sampler: change those and this node does not run again. Its preview "
            "shows the mask on the picture, and what the language model sees: the subject on white.",
            inputs=[
                MomaMllm.Input("mllm", tooltip="From Load MoMA MLLM or Load MoMA."),
                MomaAdapter.Input("adapter", tooltip="From Load MoMA Adapter or Load MoMA."),
                io.Image.Input(
                    "image",
                    tooltip="The reference picture, or a batch of pictures of one subject. Grey and transparent "
                    "pictures are fine. Each is brought to the size that the adapter takes: 512x512 for MoMA's.",
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
                    "subject word in it. Of {beach|city}, each run takes one, the same one in all MoMA nodes.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="squash",
                    tooltip="How a non-square picture becomes square: squash (as the released code), pad with white, "
                    "or crop around the subject.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "cache",
                    default=True,
                    optional=True,
                    tooltip="Keep what the MLLM makes of this picture, subject and prompt in a small file in ComfyUI's "
                    "user folder, so that it never runs twice for the same, also after a restart. Off: run it again.",
                    advanced=True,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 on the subject; any size; one for each picture, or one for all. Unconnected: the "
                    "picture's transparency, or else the whole picture. For the MASK of a cut-out PNG from Load Image, "
                    "invert it first.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=DEFAULT_THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Where a soft mask is cut: 0 is the level of its background, 1 that of its subject. Lower "
                    "takes more of a soft edge; 0 takes whatever is not black, as the released code. A mask of black "
                    "and white alone needs no cut.",
                    advanced=True,
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
    def fingerprint_inputs(cls, subject: str | None, prompt: str | None, **_: Any) -> str:
        return fingerprint(subject, prompt)

    @classmethod
    def execute(
        cls,
        mllm: Mllm,
        adapter: Adapter,
        image: Any,
        subject: str,
        prompt: str,
        fit: str,
        cache: bool = True,
        mask: Any = None,
        mask_threshold: float = DEFAULT_THRESHOLD,
    ) -> io.NodeOutput:
        if image is None:
            raise ValueError(NO_PICTURE)
        check_characters("subject", subject)
        check_characters("prompt", prompt)
        draw = run_id() if has_choice(subject, prompt) else ""
        subject, prompt = choose(subject, draw), choose(prompt, draw)
        word = normalize("NFC", " ".join(subject.split()))  # accents in one way, so that equal words are equal
        if not visible(plain_text(word)).strip():
            raise ValueError("subject is empty: give the word for what is in the picture, as in 'car'.")
        if mllm.hidden_size != adapter.sizes.hidden:
            raise ValueError(
                f"adapter {adapter.name} takes hidden states of size {adapter.sizes.hidden}, but mllm {mllm.name} has "
                f"{mllm.hidden_size}: they do not belong together. Choose both of MoMA's release ({FOLDER} and "
                f"{ADAPTER_NAME}) or, with the small checkpoint, both of the pack ({OWN_MLLM} and {OWN_ADAPTER})."
            )
        references = prepare_references(image, mask, fit, mask_threshold, adapter.reference_size)
        text = "\n".join([coverage(references.masks), *references.notes])
        show_text(text)  # before the language model runs: there may be a reason to stop
        spoken = plain_text(word), plain_text(prompt)  # emphasis is for CLIP; the MLLM reads words
        hidden_state = HiddenStateCache(user_folder(HIDDEN_STATES)).hidden_state if cache else subject_hidden_state
        hidden = [
            hidden_state(mllm, one, inside, *spoken)
            for one, inside in zip(references.images.numpy(), references.masks.numpy(), strict=True)
        ]
        embedding = torch.stack([adapter.map_hidden_state(one) for one in hidden]).mean(dim=0)
        if not embedding.isfinite().all():
            raise ValueError(f"mllm {mllm.name} gave NaN for this picture and prompt; choose precision bf16 or fp32.")
        seen = what_was_seen(references.images, references.masks)
        made = Subject(embedding, word, prompt, references.images, references.masks, adapter.identity, draw, adapter)
        shown = {**ui.PreviewImage(seen, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(made, ui=shown)


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
