"""Folders of finished runs whose pictures a test paints, and tiny checkpoints of the backbones' formats."""

import csv
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from workbench.bootstrap import comfyui_path

SIDE = 64
WORKFLOW = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
    "3": {"class_type": "LoadImageMask", "inputs": {"image": "example.png", "channel": "red"}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}, "_meta": {"title": "Prompt"}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["1", 1]}},
    "8": {"class_type": "MoMAApplyAdapter", "inputs": {"weight": 1.0, "model": ["1", 0]}},
    "9": {"class_type": "MoMASelfAttnShortcut", "inputs": {"strength": 1.0, "model": ["8", 0]}},
    "10": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
    "11": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 1, "steps": 20, "cfg": 4.0, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0,
            "model": ["9", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["10", 0],
        },
    },
    "12": {"class_type": "VAEDecode", "inputs": {"samples": ["11", 0], "vae": ["1", 2]}},
    "13": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a", "images": ["12", 0]}},
}  # fmt: skip
MASK_NODES = {
    "20": {"class_type": "MoMASubjectMask", "inputs": {"latent": ["11", 0]}},
    "21": {"class_type": "MaskToImage", "inputs": {"mask": ["20", 0]}},
    "22": {"class_type": "SaveImage", "inputs": {"filename_prefix": "m", "images": ["21", 0]}},
}

Pixels = np.ndarray[Any, Any]


def square(side: int = SIDE, top: int = 16, left: int = 16, size: int = 32) -> Pixels:
    """A mask with a square in it."""
    mask = np.zeros((side, side), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def scene(subject: tuple[int, int, int], around: tuple[int, int, int], mask: Pixels | None = None) -> Pixels:
    """A picture of a plain subject on a plain background."""
    where = square() if mask is None else mask
    return np.where(where[..., None], np.uint8(subject), np.uint8(around))


@dataclass
class MadeRun:
    """A run's folder, as `moma_batch run` leaves it; `write` puts it on the disk."""

    folder: Path
    workflow: dict[str, Any] = field(default_factory=lambda: {**WORKFLOW, **MASK_NODES})
    rows: list[dict[str, str]] = field(default_factory=list)
    results: list[dict[str, str]] = field(default_factory=list)

    def file(self, name: str, pixels: Pixels) -> str:
        """A picture, or a mask, below the table's folder."""
        path = self.folder.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint8) * 255).save(path)
        return name

    def add(self, row: dict[str, str], picture: Pixels, mask: Pixels | None = None) -> None:
        """A row with what was made of it."""
        name = f"{row['id']}.png"
        path = self.folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        if mask is not None:
            Image.fromarray(mask.astype(np.uint8) * 255).save(path.with_stem(f"{path.stem}~2"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.fail(row, "ok", "")
        self.results[-1] |= {"picture": f"images/{name}", "sha256": digest}

    def fail(self, row: dict[str, str], status: str, message: str) -> None:
        """A row that has no picture."""
        self.rows.append(row)
        told = {"id": row["id"], "row": str(len(self.rows)), "status": status, "message": message}
        self.results.append({**told, "picture": "", "sha256": ""})

    def write(self) -> Path:
        """The run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        table, workflow = (self.folder.parent / f"{self.folder.name}{end}" for end in (".csv", ".json"))
        workflow.write_text(json.dumps(self.workflow), encoding="utf-8")
        for path, lines in ((table, self.rows), (self.folder / "results.csv", self.results)):
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
                writer.writeheader()
                writer.writerows(lines)
        plan = {"version": 1, "run": "a", "table": str(table), "workflow": str(workflow)}
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        return self.folder


def tiny_clip(folder: Path) -> Path:
    """A CLIP of random weights, with the vocabulary and the preprocessing of the real ones."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sides).save_pretrained(folder)
    transformers.CLIPTokenizer.from_pretrained(comfyui_path() / "comfy" / "sd1_tokenizer").save_pretrained(folder)
    return folder


def tiny_dino(folder: Path, version: int = 1) -> Path:
    """A DINO (1 or 2) of random weights with the preprocessing of the real ones."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if version == 1:
        transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=64)).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
        sides = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
        transformers.BitImageProcessor(**sides).save_pretrained(folder)
    return folder
