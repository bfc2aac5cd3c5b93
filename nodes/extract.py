"""Extract Subject Features."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import normalize

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..moma_modules.adapter.loading import Adapter
from ..moma_modules.download.release import ADAPTER_NAME, FOLDER
from ..moma_modules.host.folders import OWN_ADAPTER, OWN_MLLM, user_folder
from ..moma_modules.host.messages import run_id, show_text
from ..moma_modules.host.pictures import coverage, what_was_seen
from ..moma_modules.mini.choices import example_in
from ..moma_modules.mllm.entries import Question, executing_entry, note_entry
from ..moma_modules.mllm.hidden_state_cache import HIDDEN_STATES, HiddenStateCache
from ..moma_modules.mllm.loading import Mllm
from ..moma_modules.prompt.choices import choose, fingerprint, has_choice
from ..moma_modules.prompt.clip_tokens import visible
from ..moma_modules.prompt.text import check_characters, plain_text
from ..moma_modules.subject.reference_image import FITS, References, prepare_references
from ..moma_modules.subject.reference_mask import DEFAULT_THRESHOLD
from ..moma_modules.subject.subject import Subject
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
    def check_lazy_status(cls, mllm: Mllm, **inputs: Any) -> list[str]:
        """Nothing is lazy: of a list, ComfyUI calls this for every entry before the first one runs."""
        note_entry(mllm, lambda: _Entry.of(mllm, **inputs))
        return []

    @classmethod
    def execute(cls, mllm: Mllm, adapter: Adapter, *inputs: Any, **named: Any) -> io.NodeOutput:
        """The inputs are those of `_Entry.of`."""
        with executing_entry(mllm) as (entries, number):
            entry: _Entry = entries.entry(number, lambda: _Entry.of(mllm, adapter, *inputs, **named))
            text = "\n".join([coverage(entry.references.masks), *entry.references.notes])
            show_text("\n".join([text, *entries.refused()]))  # before it runs: there may be a reason to stop
            made = entry.subject(mllm, adapter, entries.answers(mllm, entry))
        seen = what_was_seen(made.images, made.masks)
        shown = {**ui.PreviewImage(seen, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(made, ui=shown)


@dataclass(frozen=True)
class _Entry:
    """What the node is given, once or for one entry of a list, checked.

    Attributes:
        word: The subject's word(s).
        draw: What decided the choices in the texts, if there were any.
        cache: See `HiddenStateCache`; None: computed anew.
    """

    word: str
    prompt: str
    draw: str
    references: References
    cache: HiddenStateCache | None

    @classmethod
    def of(
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
    ) -> "_Entry":
        """From the node's inputs.

        Raises:
            ValueError: Naming the input that cannot be used.
        """
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
        if adapter.reference_size > image.shape[1] and (example := example_in(image)):
            raise ValueError(
                f"image is {example!r}, the example of Load MoMA Checkpoint for the small checkpoint, and adapter "
                f"{adapter.name} takes pictures of {adapter.reference_size}x{adapter.reference_size}. For photographs "
                "unmute the Load Image before that loader (select it, Ctrl+M) or connect one, and paint the mask there."
            )
        kept = HiddenStateCache(user_folder(HIDDEN_STATES)) if cache else None
        return cls(word, prompt, draw, references, kept)

    @cached_property
    def questions(self) -> list[Question]:
        """What the language model is asked of each picture. Emphasis is for CLIP; it reads words."""
        text = plain_text(self.word), plain_text(self.prompt)
        pictures = zip(self.references.images.numpy(), self.references.masks.numpy(), strict=True)
        return [Question(image, mask, text) for image, mask in pictures]

    def subject(self, mllm: Mllm, adapter: Adapter, hidden: list[Tensor]) -> Subject:
        """The subject, from a hidden state for each question.

        Raises:
            ValueError: They hold NaN.
        """
        embedding = torch.stack([adapter.map_hidden_state(one) for one in hidden]).mean(dim=0)
        if not embedding.isfinite().all():
            raise ValueError(f"mllm {mllm.name} gave NaN for this picture and prompt; choose precision bf16 or fp32.")
        images, masks = self.references.images, self.references.masks
        return Subject(embedding, self.word, self.prompt, images, masks, adapter.identity, self.draw, adapter)
