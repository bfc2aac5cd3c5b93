"""The networks that measure, in transformers' formats: CLIP, DINO, DINOv2; from a folder or the hub's local cache."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor

from ..table import TableError

DEFAULTS = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vits16", "dinov2": "facebook/dinov2-small"}
"""What is measured with unless another is named: those of the published evaluations."""
_TYPES = {"clip": "clip", "dino": "vit", "dinov2": "dinov2"}
_FILES = ("*.json", "*.txt", "*.safetensors", "pytorch_model.bin")
_SETTINGS = ("config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt")


class Backbone(Protocol):
    """What a figure is measured with.

    Attributes:
        name: Short, and other for other weights; every figure says it.
        image_measure: What the likeness of two pictures is called, as in CLIP-I.
        text_measure: What that of picture and text is called, as in CLIP-T; empty if texts cannot be embedded.
        about: What is to be recorded of it.
    """

    name: str
    image_measure: str
    text_measure: str
    about: dict[str, str]

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of RGB pictures, each of its own size: [B, D] fp32 on the CPU; their cosine is the likeness."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, to be held against those of pictures: [B, D] fp32 on the CPU."""


@dataclass(frozen=True)
class _Files:
    """A model's folder, and what is known of it."""

    folder: Path
    named: str
    revision: str

    def digest(self) -> str:
        """SHA-256 of what decides over its figures: weights, configuration, preprocessing, vocabulary."""
        weights = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))
        found = hashlib.sha256()
        for path in [*(self.folder / name for name in _SETTINGS), *weights]:
            if path.is_file():
                found.update(_sha256(path))
        return found.hexdigest()


class Pretrained:
    """A model of transformers' with its own preprocessing, in fp32."""

    def __init__(self, kind: str, files: _Files, device: torch.device) -> None:
        """Load it.

        Raises:
            TableError: The folder does not hold such a model.
        """
        option = f"--{kind} {files.named}"
        try:
            config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TableError(f"{option}: {files.folder} holds no model of transformers': {error}") from error
        if config.get("model_type") != _TYPES[kind]:
            raise TableError(
                f"{option} is a model of the type {config.get('model_type')!r}, expected {_TYPES[kind]!r}."
            )
        local: dict[str, Any] = {"local_files_only": True}
        try:
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(files.folder, **local)
            if kind == "clip":
                self._model: Any = transformers.CLIPModel.from_pretrained(files.folder, **local)
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(files.folder, **local)
            else:
                more = {"add_pooling_layer": False} if kind == "dino" else {}
                self._model = transformers.AutoModel.from_pretrained(files.folder, **more, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise TableError(f"{option}: {files.folder} cannot be loaded: {error}") from error
        self._model = self._model.to(device, torch.float32).eval().requires_grad_(False)
        self._device, self._clip = device, kind == "clip"
        digest = files.digest()
        self.name = f"{files.named.rstrip('/').rpartition('/')[2]} {digest[:8]}"
        self.image_measure, self.text_measure = {
            "clip": ("CLIP-I", "CLIP-T"),
            "dino": ("DINO", ""),
            "dinov2": ("DINOv2", ""),
        }[kind]
        self.about = {
            "model": files.named,
            "revision": files.revision,
            "sha256": digest,
            "preprocessing": type(self._processor).__name__,
            "transformers": transformers.__version__,
        }

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """See `Backbone`: CLIP's projected embedding, the others' class token after the last norm."""
        values = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self._device)
        if self._clip:
            pooled = self._model.vision_model(pixel_values=values).pooler_output
            return self._model.visual_projection(pooled).cpu()
        return self._model(pixel_values=values).last_hidden_state[:, 0].cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """See `Backbone`; what is longer than CLIP can read is cut off."""
        longest = self._model.config.text_config.max_position_embeddings
        words = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = self._tokenizer(list(texts), **words).to(self._device)
        read = self._model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return self._model.text_projection(read.pooler_output).cpu()


def _sha256(path: Path) -> bytes:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.digest()


def find_device(named: str) -> torch.device:
    """`auto`: a card, where PyTorch sees one.

    Raises:
        TableError: There is no such device.
    """
    if named == "auto":
        named = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=named)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TableError(f"--device {named} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(named)


def load_backbone(kind: str, where: str, device: torch.device, download: bool = False) -> Backbone:
    """The model of a folder, or of a hub's name that is in its local cache.

    Args:
        kind: A key of `DEFAULTS`.
        download: Fetch what is not in the cache.

    Raises:
        TableError: It is not there, or of another kind.
    """
    if Path(where).is_dir():
        return Pretrained(kind, _Files(Path(where), Path(where).resolve().name, ""), device)
    try:
        found = Path(snapshot_download(where, local_files_only=not download, allow_patterns=list(_FILES)))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        why = f": {error}" if download else ""
        raise TableError(
            f"--{kind} {where} is neither a folder nor in the hub's cache ({HF_HUB_CACHE}){why}. Name the model's "
            f"folder, let --download fetch it, or leave its figures out with --{kind} none."
        ) from error
    return Pretrained(kind, _Files(found, where, found.name), device)
