"""A subject: what MoMA knows of the thing in the reference image, and its file."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "moma_subject"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """One subject, extracted once and used by any number of runs (MOMA_SUBJECT).

    Attributes:
        embedding: [1, 1024] float32 on the CPU: the mapped hidden state of the MLLM.
        word: The subject word(s), as in "car" or "stuffed animal".
        prompt: The prompt it was extracted for.
        image: Reference [512, 512, 3] uint8, background included.
        mask: [512, 512] bool, True on the subject.
        adapter_identity: Content hash of the adapter whose mapping made the embedding.
    """

    embedding: Tensor
    word: str
    prompt: str
    image: Tensor
    mask: Tensor
    adapter_identity: str

    @cached_property
    def key(self) -> str:
        """Content hash: two equal subjects are one, wherever they came from."""
        digest = hashlib.sha256(self.word.encode())
        for tensor in (self.embedding, self.image, self.mask.to(torch.uint8)):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def save_subject(subject: Subject, path: Path) -> None:
    """Write a subject to one `.safetensors` file, in place only once it is complete."""
    tensors = {
        "embedding": subject.embedding.contiguous(),
        "image": subject.image.contiguous(),
        "mask": subject.mask.to(torch.uint8).contiguous(),
    }
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "subject": subject.word,
        "prompt": subject.prompt,
        "adapter": subject.adapter_identity,
    }
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def load_subject(path: Path) -> Subject:
    """Read a saved subject.

    Raises:
        ValueError: The file is unreadable, of another kind, of a newer format version, or has wrong content.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata, path)
            names = sorted(file.keys())
            if names != ["embedding", "image", "mask"]:
                raise ValueError(
                    f"{path} should hold embedding, image and mask, found {', '.join(names) or 'nothing'}."
                )
            embedding, image, mask = (file.get_tensor(name) for name in names)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable saved subject: {error}") from error
    _check_tensors(embedding, image, mask, path)
    return Subject(
        embedding=embedding,
        word=metadata["subject"],
        prompt=metadata["prompt"],
        image=image,
        mask=mask > 0,
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


def _check_tensors(embedding: Tensor, image: Tensor, mask: Tensor, path: Path) -> None:
    if embedding.dtype != torch.float32 or embedding.ndim != 2 or embedding.shape[0] != 1:
        raise ValueError(f"{path}: embedding is {embedding.dtype} {tuple(embedding.shape)}, expected float32 [1, N].")
    if not embedding.isfinite().all():
        raise ValueError(f"{path}: the embedding holds NaN or infinite values.")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{path}: image is {image.dtype} {tuple(image.shape)}, expected uint8 [H, W, 3].")
    if mask.dtype != torch.uint8 or mask.shape != image.shape[:2]:
        raise ValueError(f"{path}: mask is {mask.dtype} {tuple(mask.shape)}, expected uint8 {tuple(image.shape[:2])}.")
    if not mask.any():
        raise ValueError(f"{path}: the mask is empty.")
