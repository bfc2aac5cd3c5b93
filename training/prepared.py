"""What training needs of a user's pictures, computed once by the frozen models and kept on the disk.

The language model goes first and is let go: it and the diffusion model need not fit on the card together.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..moma_modules.mllm.encode import subject_hidden_state
from ..moma_modules.prompt.subject_tokens import PROMPT_TEMPLATE, fill_template
from .adapter_stage import Samples
from .folder_data import Entry
from .loop import write_whole


@dataclass(frozen=True)
class Item:
    """A line of the data with one variant of its reference."""

    entry: Entry
    variant: int
    size: int

    def name(self, of: str) -> str:
        """A file name that is another one when what it is computed from changes.

        Args:
            of: Which models compute it.
        """
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.entry.files()]
        texts = [self.entry.word, self.entry.prompt, self.entry.strength]
        content = json.dumps([files, texts, self.variant, self.size, of])
        return hashlib.sha256(content.encode()).hexdigest()[:32] + ".safetensors"


def items_of(entries: list[Entry], variants: int, size: int) -> list[Item]:
    """All lines, those without a reference of their own in so many variants."""
    return [
        Item(entry, variant, size)
        for entry in entries
        for variant in range(1 if entry.reference is not None else variants)
    ]


class Prepared:
    """Files in a folder, by item."""

    def __init__(self, folder: Path, items: list[Item], of: str) -> None:
        """Take what is there already.

        Args:
            of: Which models compute the files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.items = items
        self._paths = [folder / item.name(of) for item in items]

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.items)

    @property
    def complete(self) -> bool:
        """Whether all files are there."""
        return all(path.is_file() for path in self._paths)

    def compute(self, what: str, of: Callable[[Item], dict[str, Tensor]]) -> None:
        """Compute what is missing."""
        for number, (item, path) in enumerate(zip(self.items, self._paths, strict=True), 1):
            if not path.is_file():
                tensors = of(item)
                broken = [name for name, value in tensors.items() if not value.float().isfinite().all()]
                if broken:
                    raise ValueError(f"{item.entry}: the {broken[0]} came out as NaN or infinite.")
                write_whole(path, functools.partial(save_file, tensors))
                if number % 50 == 0 or number == len(self):
                    print(f"{what}: {number:,} of {len(self):,}", flush=True)

    def load(self, number: int) -> dict[str, Tensor]:
        """The tensors of an item."""
        return load_file(self._paths[number])


def hidden_of(mllm: Any) -> Callable[[Item], dict[str, Tensor]]:
    """What the language model says of an item, by the product's own code: `hidden` [hidden]."""

    def compute(item: Item) -> dict[str, Tensor]:
        picture, mask = item.entry.shown(item.size, item.variant)
        with torch.inference_mode():
            hidden = subject_hidden_state(mllm, picture, mask, item.entry.word, item.entry.prompt)
        return {"hidden": hidden[0].clone()}

    return compute


def encoded_by(model: Any, clip: Any, vae: Any, clip_vision: Any = None) -> Callable[[Item], dict[str, Tensor]]:
    """Latents, texts and masks of an item; with `clip_vision` also the embedding of its target, which is learned."""

    def latent(picture: Any) -> Tensor:
        pixels = torch.from_numpy(picture.copy())[None].float() / 255
        return model.model.process_latent_in(vae.encode(pixels).float().cpu())[0].half()

    def text(words: str) -> Tensor:
        return clip.encode_from_tokens(clip.tokenize(words))[0].half().cpu()

    def compute(item: Item) -> dict[str, Tensor]:
        entry = item.entry
        picture, mask = entry.target(item.size)
        reference, reference_mask = entry.shown(item.size, item.variant)
        with torch.inference_mode():
            found = {
                "clean": latent(picture),
                "mask": torch.nn.functional.avg_pool2d(torch.from_numpy(mask).float()[None], 8)[0].half(),
                "text": text(fill_template(PROMPT_TEMPLATE, entry.word, entry.prompt)),
                "reference": latent(reference),
                # Every layer takes the nearest places of it: the latents' are all that any layer sees.
                "reference_mask": torch.from_numpy(reference_mask[::8, ::8].copy()),
                "word": text(entry.word),
            }
            if clip_vision is not None:
                pixels = torch.from_numpy(picture.copy())[None].float() / 255
                found["embedding"] = clip_vision.encode_image(pixels)["image_embeds"][0].float().cpu()
        return {name: value.clone().contiguous() for name, value in found.items()}

    return compute


def samples_of(numbers: list[int], hidden: Prepared, encoded: Prepared, device: torch.device) -> Samples:
    """Rows to learn from, by the items' numbers."""
    rows = [{**hidden.load(number), **encoded.load(number)} for number in numbers]

    def stacked(name: str) -> Tensor:
        return torch.stack([row[name] for row in rows]).to(device).float()

    return Samples(
        clean=stacked("clean"),
        masks=stacked("mask"),
        texts=_even([row["text"] for row in rows]).to(device),
        hidden=stacked("hidden"),
        references=stacked("reference"),
        reference_masks=stacked("reference_mask") > 0,
        words=_even([row["word"] for row in rows]).to(device),
        strengths=torch.tensor([encoded.items[number].entry.strength for number in numbers], device=device),
    )


def _even(texts: list[Tensor]) -> Tensor:
    """[R, L, context] float32: texts of different lengths are repeated to a common one, as ComfyUI does."""
    length = math.lcm(*(len(text) for text in texts))
    return torch.stack([text.repeat(length // len(text), 1) for text in texts]).float()
