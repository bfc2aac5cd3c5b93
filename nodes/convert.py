"""Convert MoMA MLLM."""

from comfy_api.latest import io, ui

from ..moma_modules.host.disk import check_new_name, megabytes
from ..moma_modules.host.folders import MODELS, new_model_path
from ..moma_modules.host.messages import FileProgress
from ..moma_modules.mllm.convert import PRECISIONS, convert_mllm
from ..moma_modules.mllm.loading import mllm_choices, mllm_path
from .types import CATEGORY


class ConvertMllm(io.ComfyNode):
    """Writes an MLLM to one smaller file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMAConvertMLLM",
            display_name="Convert MoMA MLLM",
            category=CATEGORY,
            search_aliases=["quantize", "fp8", "int8", "convert LLaVA"],
            description="Writes an MLLM to one .safetensors file in models/moma, for Load MoMA MLLM. In 8 bit it takes "
            "half the disk and memory. The source is kept.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=mllm_choices(),
                    tooltip="The MLLM to convert, not one in 8 bit.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp8",
                    tooltip="What the weights are stored in. fp8 and int8: the matrices of the language layers in 8 "
                    "bit, one scale a row, the rest as it is. keep: all as it is.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="Name of the new file in models/moma, perhaps with a subfolder. Empty: the model's name "
                    "and the precision, as in MoMA_llava_7b_fp8.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None, filename: str | None = None) -> bool | str:
        try:
            if filename:
                check_new_name("filename", filename, f"models/{MODELS}")
            if model_name is not None:
                mllm_path(model_name)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model_name: str, precision: str, filename: str) -> io.NodeOutput:
        source = mllm_path(model_name)
        name = source.name if source.is_dir() else source.stem
        target = new_model_path("filename", filename or f"{name}_{precision}")
        convert_mllm(source, target, precision, FileProgress())
        size = megabytes(target.stat().st_size)
        return io.NodeOutput(ui=ui.PreviewText(f"{target} ({size}). Press R, then choose it in Load MoMA MLLM."))
