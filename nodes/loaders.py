"""Load MoMA, Load MoMA MLLM, Load MoMA Adapter."""

import os

from comfy_api.latest import io, ui

from ..moma_modules.adapter.loading import adapter_choices, adapter_path, download_adapter, load_adapter
from ..moma_modules.download.release import ADAPTER_NAME, ADAPTER_SIZE, FOLDER, MLLM_SIZE, REPOSITORY
from ..moma_modules.host.messages import show_text
from ..moma_modules.mllm.checkpoint_files import checkpoint_files
from ..moma_modules.mllm.loading import download_mllm, load_mllm, mllm_choices, mllm_path
from ..moma_modules.mllm.precision import PRECISIONS
from .types import CATEGORY, MomaAdapter, MomaMllm


def _download_input(files: str) -> io.Boolean.Input:
    return io.Boolean.Input(
        "download",
        default=False,
        optional=True,
        tooltip=f"Fetches {files} from huggingface.co/{REPOSITORY} into models/moma/{FOLDER} when they are not there. "
        "Off: this node never connects to anything.",
        advanced=True,
    )


def _mllm_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "model_name",
            options=mllm_choices(),
            tooltip="A LLaVA checkpoint in models/moma: a folder such as MoMA_llava_7b, or a file from "
            "Convert MoMA MLLM.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            tooltip="auto: the file's weights, moved to the GPU layer by layer where they do not fit, computed in "
            "the dtype that is fastest there; fp8 only if they fit nowhere. bf16, fp16, fp32: the dtype to compute in. "
            "fp8: half the memory. 8-bit, 4-bit: a half and a third; they need bitsandbytes, installed by you.",
            advanced=True,
        ),
    ]


def _adapter_input() -> io.Input:
    return io.Combo.Input(
        "adapter_name",
        options=adapter_choices(),
        tooltip="A MoMA adapter in models/moma or a folder below it.",
    )


class LoadMllm(io.ComfyNode):
    """Loads MoMA's LLaVA checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadMLLM",
            display_name="Load MoMA MLLM",
            category=CATEGORY,
            search_aliases=["LLaVA", "VLM", "vision language model"],
            description="Loads the multimodal language model (MoMA's LLaVA-1.5 7B) that looks at the reference. "
            "It is needed only to extract subjects; saved subjects work without it. Its weights are read when the "
            "first extraction needs them.",
            inputs=[
                *_mllm_inputs(),
                _download_input(f"the MLLM ({MLLM_SIZE})"),
            ],
            outputs=[MomaMllm.Output("mllm", display_name="mllm", tooltip="For Extract Subject Features.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None, download: bool | None = False) -> bool | str:
        if model_name is None or (download is not False and model_name == FOLDER):
            return True  # linked, or to be seen when it runs
        try:
            mllm_path(model_name)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, precision: str | None, download: bool | None = False) -> str:
        if model_name is None:  # linked
            return ""
        stats = [(path.name, path.stat()) for path in checkpoint_files(mllm_path(model_name))]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    @classmethod
    def execute(cls, model_name: str, precision: str, download: bool = False) -> io.NodeOutput:
        if download and model_name == FOLDER:
            download_mllm()
        mllm = load_mllm(mllm_path(model_name), precision)
        show_text(mllm.plan.summary)
        return io.NodeOutput(mllm, ui=ui.PreviewText(mllm.plan.summary))


class LoadAdapter(io.ComfyNode):
    """Loads MoMA's attention adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadAdapter",
            display_name="Load MoMA Adapter",
            category=CATEGORY,
            search_aliases=["model of IPAdapter", "adapter loader"],
            description="Loads attn_adapters_projectors.th (or its .safetensors form): the small networks that connect "
            "the subject to an SD1.5 model.",
            inputs=[
                _adapter_input(),
                _download_input(f"the adapter ({ADAPTER_SIZE})"),
            ],
            outputs=[
                MomaAdapter.Output(
                    "adapter",
                    display_name="adapter",
                    tooltip="For Extract Subject Features, Apply MoMA Adapter and Self-Attn Shortcut.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None, download: bool | None = False) -> bool | str:
        if adapter_name is None or (download is not False and adapter_name == ADAPTER_NAME):
            return True  # linked, or to be seen when it runs
        try:
            adapter_path(adapter_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, download: bool | None = False) -> str:
        if adapter_name is None:  # linked
            return ""
        status = os.stat(adapter_path(adapter_name))
        return f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def execute(cls, adapter_name: str, download: bool = False) -> io.NodeOutput:
        if download and adapter_name == ADAPTER_NAME:
            download_adapter()
        return io.NodeOutput(load_adapter(adapter_path(adapter_name)))


class LoadBoth(io.ComfyNode):
    """Loads both files of MoMA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoad",
            display_name="Load MoMA",
            category=CATEGORY,
            search_aliases=["loader (IPAdapter)", "loader (LLaVA)", "unified loader"],
            description="Loads both files of MoMA for Extract Subject Features: the language model and the adapter, as "
            "Load MoMA MLLM and Load MoMA Adapter do. The subject takes the adapter along to Apply MoMA Subject.",
            inputs=[*_mllm_inputs(), _adapter_input(), _download_input(f"both ({MLLM_SIZE} and {ADAPTER_SIZE})")],
            outputs=[
                MomaMllm.Output("mllm", display_name="mllm", tooltip="For Extract Subject Features."),
                MomaAdapter.Output("adapter", display_name="adapter", tooltip="For Extract Subject Features."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, adapter_name: str | None = None, download: bool | None = False
    ) -> bool | str:
        of_mllm = LoadMllm.validate_inputs(model_name, download)
        return LoadAdapter.validate_inputs(adapter_name, download) if of_mllm is True else of_mllm

    @classmethod
    def fingerprint_inputs(
        cls, model_name: str | None, precision: str | None, adapter_name: str | None, download: bool | None = False
    ) -> str:
        of_mllm = LoadMllm.fingerprint_inputs(model_name, precision, download)
        return f"{of_mllm} {LoadAdapter.fingerprint_inputs(adapter_name, download)}"

    @classmethod
    def execute(cls, model_name: str, precision: str, adapter_name: str, download: bool = False) -> io.NodeOutput:
        mllm = LoadMllm.execute(model_name, precision, download)
        (adapter,) = LoadAdapter.execute(adapter_name, download).args
        return io.NodeOutput(*mllm.args, adapter, ui=mllm.ui)
