"""Load MoMA MLLM, Load MoMA Adapter."""

import os
from pathlib import Path

from comfy_api.latest import io, ui

from ..moma_modules.adapter import load_adapter
from ..moma_modules.comfy_bridge import folders
from ..moma_modules.comfy_bridge.node_text import show_at_node
from ..moma_modules.mllm.checkpoint import find_checkpoints
from ..moma_modules.mllm.identity import checkpoint_files
from ..moma_modules.mllm.model import load_mllm
from ..moma_modules.mllm.precision import PRECISIONS
from .types import CATEGORY, SEARCH_ALIASES, MomaAdapter, MomaMllm


def _mllm_folder(name: str) -> Path:
    found = find_checkpoints(folders.model_roots())
    name = name.replace("\\", "/")
    if name not in found:
        raise FileNotFoundError(folders.mllm_not_found(name, sorted(found)))
    return found[name]


class LoadMllm(io.ComfyNode):
    """Loads MoMA's LLaVA checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadMLLM",
            display_name="Load MoMA MLLM",
            category=CATEGORY,
            search_aliases=SEARCH_ALIASES,
            description="Loads the multimodal language model (MoMA's LLaVA-1.5 7B) that looks at the reference. "
            "It is needed only to extract subjects; saved subjects work without it. Its weights are read when the "
            "first extraction needs them.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=sorted(find_checkpoints(folders.model_roots())),
                    tooltip="A LLaVA checkpoint folder in models/moma, such as MoMA_llava_7b.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="auto: the file's weights, streamed to the card where they do not fit, in what the device "
                    "computes fast; fp8 only if they fit nowhere. bf16, fp16, fp32: what to compute in. fp8: half the "
                    "memory. 8-bit, 4-bit: a half and a third, with bitsandbytes, which is yours to install.",
                    advanced=True,
                ),
            ],
            outputs=[MomaMllm.Output("mllm", display_name="mllm", tooltip="For Extract Subject Features.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        try:
            _mllm_folder(model_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str, precision: str) -> str:
        files = checkpoint_files(_mllm_folder(model_name))
        return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])

    @classmethod
    def execute(cls, model_name: str, precision: str) -> io.NodeOutput:
        mllm = load_mllm(_mllm_folder(model_name), precision)
        show_at_node(mllm.plan.summary, cls.hidden.unique_id)
        return io.NodeOutput(mllm, ui=ui.PreviewText(mllm.plan.summary))


class LoadAdapter(io.ComfyNode):
    """Loads MoMA's attention adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoMALoadAdapter",
            display_name="Load MoMA Adapter",
            category=CATEGORY,
            search_aliases=SEARCH_ALIASES,
            description="Loads attn_adapters_projectors.th (or its .safetensors form): the small networks that connect "
            "the subject to an SD1.5 model.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.adapter_names(),
                    tooltip="A MoMA adapter in models/moma or a folder below it.",
                )
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
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        try:
            folders.adapter_path(adapter_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> str:
        status = os.stat(folders.adapter_path(adapter_name))
        return f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_adapter(folders.adapter_path(adapter_name)))
