"""Load MoMA Checkpoint."""

from typing import Any

import torch
from comfy_api.latest import io

from ..moma_modules.host.folders import embedding_folders
from ..moma_modules.host.messages import warn
from ..moma_modules.mini.checkpoint import load_checkpoint
from ..moma_modules.mini.choices import checkpoint_names, checkpoint_path, example_names, load_example
from .types import CATEGORY

DRAWS = (
    "MoMA: ckpt_name in Load MoMA Checkpoint is a small checkpoint, which knows drawings of a few things on a plain "
    "ground, and it is given a picture. For a photograph choose an SD1.5 checkpoint there, and MoMA's release in the "
    "other loaders."
)


class LoadMini(io.ComfyNode):
    """Loads a checkpoint, and hands on a picture: the user's, or with the small world's one of that world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadMini",
            display_name="Load MoMA Checkpoint",
            category=CATEGORY,
            search_aliases=["try", "example", "demo", "small", "mini", "SD1.5"],
            description="Loads an SD1.5 checkpoint as Load Checkpoint does, or the small one that comes with this "
            "pack, to try MoMA without a download: that draws painted cups, cars, houses, robots, boats, fish, bags "
            "and hats, 128x128, in seconds on a CPU. To each belong a language model and an adapter, in Load MoMA: to "
            "the small one moma_mini_llava and moma_mini_adapter, to SD1.5 those of MoMA's release.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=checkpoint_names(),
                    tooltip="First the small checkpoints: that of this pack, and yours in models/moma. Then all of "
                    "models/checkpoints, of which MoMA takes SD1.5's.",
                ),
                io.Combo.Input(
                    "example",
                    options=example_names(),
                    tooltip="The picture that the small checkpoint is tried with while no image is connected.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Your picture, from Load Image, handed on in place of the example. The small checkpoint "
                    "wants a drawing: one of its eight kinds of things on a plain ground.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 on the subject in your picture, from the same Load Image. Not connected: empty, as "
                    "of a picture in which nothing is painted.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder."),
                io.Vae.Output("vae", display_name="vae", tooltip="Between pixels and latents."),
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The connected picture; otherwise, with a small checkpoint, the example.",
                ),
                io.Mask.Output("mask", display_name="mask", tooltip="Where the subject is in that picture."),
                io.Int.Output(
                    "size",
                    display_name="size",
                    tooltip="Pixels, across and down, of the pictures that it learnt to draw: 128 for the small one, "
                    "else 512. For width and height of Empty Latent Image.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name: str | None = None, example: str | None = None) -> bool | str:
        try:
            if ckpt_name is not None:  # linked otherwise
                checkpoint_path(ckpt_name)
            if example is not None:
                load_example(example)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, example: str | None, **_: Any) -> str:
        if ckpt_name is None:  # linked
            return ""
        status = checkpoint_path(ckpt_name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def execute(cls, ckpt_name: str, example: str, image: Any = None, mask: Any = None) -> io.NodeOutput:
        if image is None and mask is not None:
            raise ValueError(
                "mask is connected, but image is not: connect the picture that it belongs to, both from one Load Image."
            )
        loaded = load_checkpoint(checkpoint_path(ckpt_name), embedding_folders())
        if image is not None and loaded.small:
            warn(DRAWS)
        if image is not None and mask is None:
            mask = torch.zeros(image.shape[:3])
        elif image is None and loaded.small:
            image, mask = load_example(example)
        # Otherwise there is no picture: whatever needs one says so, and what needs none, such as a saved subject, runs.
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, image, mask, loaded.side)
