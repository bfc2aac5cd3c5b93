"""Load MoMA Mini Checkpoint."""

from comfy_api.latest import io

from ..moma_modules.host.folders import embedding_folders
from ..moma_modules.mini.checkpoint import load_mini_checkpoint
from ..moma_modules.mini.choices import example_names, load_example, mini_names, mini_path
from .types import CATEGORY


class LoadMini(io.ComfyNode):
    """Loads the small world's diffusion model and one of its pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadMini",
            display_name="Load MoMA Mini Checkpoint",
            category=CATEGORY,
            search_aliases=["try", "example", "demo", "small"],
            description="Loads the small model that comes with this pack, to try MoMA without a download: it draws "
            "painted cups, cars, houses, robots, boats, fish, bags and hats, 128x128, in seconds on a CPU. Its "
            "language model and adapter are moma_mini_llava and moma_mini_adapter in Load MoMA.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=mini_names(),
                    tooltip="The small checkpoint: the one of this pack, or one of your own training in models/moma.",
                ),
                io.Combo.Input(
                    "example",
                    options=example_names(),
                    tooltip="A picture to try it with. A drawing of your own works as well: a subject of one of the "
                    "eight kinds on a plain ground, from Load Image.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The diffusion model; its size is 128x128."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder."),
                io.Vae.Output("vae", display_name="vae", tooltip="Between pixels and latents."),
                io.Image.Output("image", display_name="image", tooltip="The example."),
                io.Mask.Output("mask", display_name="mask", tooltip="Where the subject is in the example."),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name: str | None = None, example: str | None = None) -> bool | str:
        try:
            if ckpt_name is not None:  # linked otherwise
                mini_path(ckpt_name)
            if example is not None:
                load_example(example)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, example: str | None) -> str:
        if ckpt_name is None:  # linked
            return ""
        status = mini_path(ckpt_name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def execute(cls, ckpt_name: str, example: str) -> io.NodeOutput:
        loaded = load_mini_checkpoint(mini_path(ckpt_name), embedding_folders())
        return io.NodeOutput(*loaded, *load_example(example))
