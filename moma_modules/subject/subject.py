"""A subject: what MoMA knows of the thing in the reference image."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..host.disk import content_hash
from .run_log import RunLog


@dataclass(frozen=True)
class Subject:
    """One subject, extracted once and used by any number of runs (MOMA_SUBJECT).

    Attributes:
        embedding: [1, 1024] float32 on the CPU: the mapped hidden state of the MLLM.
        word: The subject word(s), as in "car" or "stuffed animal".
        prompt: The prompt it was extracted for.
        images: References [N, S, S, 3] uint8, background included; S is the adapter's `reference_size`.
        masks: [N, S, S] bool, True on the subject.
        adapter_identity: Content hash of the adapter whose mapping made the embedding.
        draw: What decided the choices in its texts (`choices.py`), for those of its prompts; empty if it had none.
        adapter: The loaded adapter that it was made with; None for a saved subject, which knows its identity only.
        runs: The masks of runs with this subject, of this process.
    """

    embedding: Tensor
    word: str
    prompt: str
    images: Tensor
    masks: Tensor
    adapter_identity: str
    draw: str = ""
    adapter: Any = field(default=None, compare=False, repr=False)
    runs: RunLog = field(default_factory=RunLog, init=False, compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """Content hash: two equal subjects are one, wherever they came from."""
        return content_hash(self.word, self.embedding, self.images, self.masks)


def combine_subjects(first: Subject, second: Subject) -> Subject:
    """One subject from the references of two: embeddings averaged, each reference counting alike.

    The prompt is that of `first`.

    Raises:
        ValueError: The two are not the same thing: other words, other adapters, or other picture sizes.
    """
    for name, one, other in (
        ("subject word", first.word, second.word),
        ("adapter", first.adapter_identity[:12], second.adapter_identity[:12]),
        ("embedding size", first.embedding.shape[1], second.embedding.shape[1]),
        ("size of the references", tuple(first.images.shape[1:]), tuple(second.images.shape[1:])),
    ):
        if one != other:
            raise ValueError(
                f"subject_b cannot be combined with subject_a: the {name} is {other!r} there and {one!r} here. Combine "
                "pictures of one subject, extracted with the same word and adapter. For two different subjects, chain "
                "one Apply MoMA Adapter (and Self-Attn Shortcut) for each."
            )
    share = len(first.images) / (len(first.images) + len(second.images))
    return replace(
        first,
        adapter=first.adapter or second.adapter,
        embedding=first.embedding * share + second.embedding * (1 - share),
        images=torch.cat([first.images, second.images]),
        masks=torch.cat([first.masks, second.masks]),
    )
