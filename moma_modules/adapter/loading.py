"""Adapters in ComfyUI's folders and memory management."""

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ..download.client import fetch
from ..download.release import ADAPTER_FILE, ADAPTER_NAME, ADAPTER_SIZE, ADDRESS, FOLDER
from ..host.disk import portable
from ..host.folders import MODELS, OWN_ADAPTER, OWN_CHECKPOINT, file_names, file_path, model_folder, searched
from ..host.messages import FileProgress
from .file import ADAPTER_SUFFIXES, AdapterWeights, is_adapter, read_adapter
from .networks import AdapterModule, AdapterSizes

BELONG_TOGETHER = (
    f"Choose what belongs together: an SD1.5 checkpoint and the adapter {ADAPTER_NAME}, or the small checkpoint "
    f"{OWN_CHECKPOINT} and the adapter {OWN_ADAPTER}."
)
"""What to do where an adapter and a model do not fit."""


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: what the nodes pass on as MOMA_ADAPTER.

    Attributes:
        patcher: Holds the `AdapterModule`; ComfyUI loads and offloads it.
        name: File name shown in messages.
        identity: Content hash, see `AdapterWeights.identity`.
        scales: `scale_learnable` per self-attention layer (16).
        sizes: Of its networks.
        reference_size: Side in pixels of the references that it takes.
    """

    patcher: comfy.model_patcher.ModelPatcher
    name: str
    identity: str
    scales: tuple[float, ...]
    sizes: AdapterSizes
    reference_size: int

    @property
    def module(self) -> AdapterModule:
        """The weights. Compute with them only while the patcher is loaded."""
        return self.patcher.model

    @property
    def device(self) -> torch.device:
        """Where its weights are brought to compute: not always the device of the MODEL that it is applied to."""
        return self.patcher.load_device

    def map_hidden_state(self, hidden: Tensor) -> Tensor:
        """MLLM hidden state [1, hidden] to subject embedding [1, embedding], both float32 on the CPU."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.module.mapping(hidden.to(self.device, torch.float32)).to("cpu", torch.float32)


def load_adapter(path: Path, dynamic: bool = True) -> Adapter:
    """Read an adapter file into ComfyUI's memory management.

    Args:
        dynamic: Whether it may be of the dynamic kind, where ComfyUI has that on.

    Raises:
        ValueError: The file is not a complete adapter, see `read_adapter`.
    """
    adapter = adapter_from_weights(read_adapter(path), path.name, dynamic)
    # When ComfyUI puts a MODEL on another device, it makes this model anew for that device as well.
    adapter.patcher.cached_patcher_init = (_patcher_from_file, (path,))
    return adapter


def _patcher_from_file(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_adapter(path, not disable_dynamic).patcher


def adapter_from_weights(weights: AdapterWeights, name: str, dynamic: bool = True) -> Adapter:
    """Put checked weights into a module that ComfyUI loads and offloads; stored dtypes are kept."""
    offload_device = comfy.model_management.unet_offload_device()
    # manual_cast computes in the dtype of its input, whatever each group was stored in.
    module = AdapterModule(weights.sizes, device="meta", dtype=None, operations=comfy.ops.manual_cast)
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
    patcher = kind(module, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device)
    module.load_state_dict(weights.tensors, assign=True)
    module.requires_grad_(False)
    return Adapter(patcher, name, weights.identity, weights.scales, weights.sizes, weights.reference_size)


def adapter_names() -> list[str]:
    """Adapter files below the model folders, by relative name."""
    names = [name for name in file_names(MODELS) if name.endswith(ADAPTER_SUFFIXES)]
    return [name for name in names if (path := file_path(MODELS, name)) is not None and is_adapter(path)]


def adapter_choices() -> list[str]:
    """What Load MoMA Adapter offers: the files that are there, and the released one."""
    return sorted({*adapter_names(), ADAPTER_NAME})


def adapter_path(name: str) -> Path:
    """The file of an adapter.

    Raises:
        FileNotFoundError: Saying what was looked for, where, what was found, and where to get it.
    """
    path = file_path(MODELS, name) if portable(name) in adapter_names() else None
    if path is not None:
        return path
    raise FileNotFoundError(
        f"adapter_name: there is no adapter {name!r}. {searched(MODELS, adapter_names())} Download "
        f"{ADAPTER_FILE} from {ADDRESS} into models/moma/{FOLDER}, then press R to refresh; or choose {ADAPTER_NAME} "
        f"and turn on download, an advanced input of this node ({ADAPTER_SIZE})."
    )


def download_adapter() -> None:
    """Fetch the released adapter, unless it is there.

    Raises:
        RuntimeError: See `fetch`.
    """
    fetch(model_folder(FOLDER), [ADAPTER_FILE], FileProgress())
