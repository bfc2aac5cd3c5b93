"""Load MoMA MLLM, Load MoMA Adapter."""

import os
from pathlib import Path

from comfy_api.latest import io

from ..moma_modules.adapter import load_adapter
from ..moma_modules.comfy_bridge import folders
from ..moma_modules.mllm.checkpoint import find_checkpoints
from ..moma_modules.mllm.model import PRECISIONS, load_mllm
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
            "It is needed only to extract subjects; saved subjects work without it.",
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
                    tooltip="auto keeps the file's 16-bit weights and computes in what the device is fast at. "
                    "fp32 is exact and takes twice the memory.",
                    advanced=True,
                ),
            ],
            outputs=[MomaMllm.Output("mllm", display_name="mllm", tooltip="For Extract Subject Features.")],
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
        files = sorted(path for path in _mllm_folder(model_name).iterdir() if path.is_file())
        return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])

    @classmethod
    def execute(cls, model_name: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(load_mllm(_mllm_folder(model_name), precision))


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
