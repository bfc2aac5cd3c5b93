"""A subject: what MoMA knows of the thing in the reference image, and its file."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .comfy_bridge.run_log import RunLog
from .reference_image import SIZE

FORMAT = "moma_subject"
FORMAT_VERSION = 1
NAMES = ("embedding", "images", "masks")
"""The tensors of a saved subject, in alphabetical order."""


@dataclass(frozen=True)
class Subject:
    """One subject, extracted once and used by any number of runs (MOMA_SUBJECT).

    Attributes:
        embedding: [1, 1024] float32 on the CPU: the mapped hidden state of the MLLM.
        word: The subject word(s), as in "car" or "stuffed animal".
        prompt: The prompt it was extracted for.
        images: References [N, 512, 512, 3] uint8, background included.
        masks: [N, 512, 512] bool, True on the subject.
        adapter_identity: Content hash of the adapter whose mapping made the embedding.
        draw: What decided the choices in its texts (`choices.py`), for those of its prompts; empty if it had none.
        runs: The masks of runs with this subject, of this process.
    """

    embedding: Tensor
    word: str
    prompt: str
    images: Tensor
    masks: Tensor
    adapter_identity: str
    draw: str = ""
    runs: RunLog = field(default_factory=RunLog, init=False, compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """Content hash: two equal subjects are one, wherever they came from."""
        digest = hashlib.sha256(self.word.encode())
        for tensor in (self.embedding, self.images, self.masks.to(torch.uint8)):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


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
        embedding=first.embedding * share + second.embedding * (1 - share),
        images=torch.cat([first.images, second.images]),
        masks=torch.cat([first.masks, second.masks]),
    )


def save_subject(subject: Subject, path: Path) -> None:
    """Write a subject to a new `.safetensors` file, which appears only once it is complete.

    Raises:
        FileExistsError: The file is there, or another thread or process is just writing it.
    """
    tensors = {
        "embedding": subject.embedding.contiguous(),
        "images": subject.images.contiguous(),
        "masks": subject.masks.to(torch.uint8).contiguous(),
    }
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "subject": subject.word,
        "prompt": subject.prompt,
        "adapter": subject.adapter_identity,
    }
    content = save(tensors, metadata)
    partial = path.with_name(path.name + ".part")
    partial.open("xb").close()  # who made this one may make `path`, and nobody else
    try:
        if path.exists():
            raise FileExistsError(f"{path} is there already.")
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink()
        raise


def load_subject(path: Path) -> Subject:
    """Read a saved subject.

    Raises:
        ValueError: The file is unreadable, of another kind, of a newer format version, or has wrong content.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata, path)
            _check_shapes(file, path)
            # Copied: what stays mapped keeps the file from being replaced on Windows.
            embedding, images, masks = (file.get_tensor(name).clone() for name in NAMES)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable saved subject: {error}") from error
    if not embedding.isfinite().all():
        raise ValueError(f"{path}: the embedding holds NaN or infinite values.")
    if not masks.flatten(1).any(dim=1).all():
        raise ValueError(f"{path}: a mask is empty.")
    return Subject(
        embedding=embedding,
        word=metadata["subject"],
        prompt=metadata["prompt"],
        images=images,
        masks=masks > 0,
        adapter_identity=metadata["adapter"],
    )


def _check_format(metadata: dict[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved MoMA subject (format {metadata.get('format')!r}).")
    version = metadata.get("version", "")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {version!r}; this version of the pack reads {FORMAT_VERSION}. "
            "Update ComfyUI-MoMA, or save the subject again."
        )
    missing = [key for key in ("subject", "prompt", "adapter") if key not in metadata]
    if missing:
        raise ValueError(f"{path} lacks the entry {missing[0]!r}; save the subject again.")
    if not metadata["subject"].strip():
        raise ValueError(f"{path} has no subject word; save the subject again.")


def _check_shapes(file: Any, path: Path) -> None:
    """Check what the header says of the tensors, before they are read."""
    names = sorted(file.keys())
    if names != list(NAMES):
        found = ", ".join(name[:60] for name in names[:8]) or "nothing"
        raise ValueError(f"{path} should hold embedding, images and masks, found {found}.")
    dtypes = {name: file.get_slice(name).get_dtype() for name in NAMES}
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in NAMES}
    count = (shapes["images"] or (0,))[0]
    width = (shapes["embedding"] or (0,))[-1]
    expected = {
        "embedding": ("F32", (1, width), "[1, size]"),
        "images": ("U8", (count, SIZE, SIZE, 3), f"[pictures, {SIZE}, {SIZE}, 3]"),
        "masks": ("U8", (count, SIZE, SIZE), f"[pictures, {SIZE}, {SIZE}], one for each of {count} images"),
    }
    for name, (dtype, shape, words) in expected.items():
        if dtypes[name] != dtype or shapes[name] != shape or 0 in shape:
            raise ValueError(
                f"{path}: {name} is {dtypes[name]} {shapes[name]}, expected {dtype} {words}. Save the subject again."
            )
