"""MLLMs in ComfyUI's folders and memory management.

Weights stay in the memory-mapped pages of the files, where possible, or are packed smaller.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from ..download.client import fetch
from ..download.release import ADDRESS, FOLDER, MLLM_FILES, MLLM_SIZE
from ..host.disk import portable
from ..host.folders import MODELS, model_folder, model_roots, searched
from ..host.messages import FileProgress
from ..host.weight_files import readable
from .beginnings import Beginnings
from .blocks import cast_in_blocks
from .checkpoint import Checkpoint, read_checkpoint, read_named_weights
from .checkpoint_files import absent_files, checkpoint_identity, find_checkpoints, incomplete
from .leaves import CastLinear, PackingLinear, RowScaledLinear
from .module import MllmModule, fill_constants
from .precision import PACKED, Machine, Plan, is_kept, is_language_matrix, is_table, make_plan
from .read_ahead import ReadAhead
from .seam import use_comfy_leaves
from .weights import SCALE_SUFFIX

_SWITCH = f"choose {FOLDER} in Load MoMA MLLM and turn on download, an advanced input ({MLLM_SIZE})."


def mllm_choices() -> list[str]:
    """What Load MoMA MLLM offers: the checkpoints that are there, and the released one."""
    return sorted({*find_checkpoints(model_roots()), FOLDER})


def mllm_path(name: str) -> Path:
    """The folder or file of an MLLM, with all its files.

    Raises:
        FileNotFoundError: Saying what was looked for, where, what was found, and where to get it.
        ValueError: An index file in it is unreadable.
    """
    found = find_checkpoints(model_roots())
    path = found.get(portable(name))
    if path is None:
        raise FileNotFoundError(
            f"model_name: there is no MLLM {name!r}. {searched(MODELS, sorted(found))} Download {ADDRESS} "
            f"({', '.join(MLLM_FILES)}) into models/moma/{FOLDER}, then press R to refresh; or {_SWITCH}"
        )
    absent = absent_files(path)
    if absent:
        raise FileNotFoundError(f"model_name: {incomplete(path, absent)} Or {_SWITCH}")
    return path


def download_mllm() -> None:
    """Fetch the released MLLM, unless it is there in any form.

    Raises:
        RuntimeError: See `fetch`.
    """
    folder = model_folder(FOLDER)
    if not folder.is_dir() or absent_files(folder):
        fetch(folder, list(MLLM_FILES), FileProgress())


@dataclass(frozen=True, eq=False)
class LoadedMllm:
    """The weights of an MLLM, shared by all that name it; freed when nothing does any more.

    Attributes:
        patcher: Holds the `MllmModule`; ComfyUI loads and offloads it.
        plan: How it is kept and computed.
        beginnings: What it made of the beginnings of instructions.
    """

    patcher: comfy.model_patcher.ModelPatcher
    plan: Plan
    beginnings: Beginnings

    @property
    def module(self) -> MllmModule:
        """The module. Compute with it only while the patcher is loaded."""
        return self.patcher.model

    @property
    def is_in_files(self) -> bool:
        """Whether the matrices in RAM are pages of the files, which may have to come from the disk."""
        return not (self.plan.storage or self.plan.cast_once or comfy.utils.DISABLE_MMAP)


_LOADED: WeakValueDictionary[tuple[str, Plan], LoadedMllm] = WeakValueDictionary()
"""What is loaded now, by identity and plan; keeps nothing alive."""


@dataclass(frozen=True, eq=False)
class Mllm:
    """A checked MLLM, whose weights are read when they are first needed: what the nodes pass on as MOMA_MLLM.

    Attributes:
        path: The checkpoint.
        name: Its name in messages.
        identity: Content hash, see `checkpoint_identity`.
        precision: As chosen at the node.
        plan: What that means for this file on this machine.
        hidden_size: Size of a hidden state (4096 in the released checkpoint).
        image_size: Side of the vision tower's input (336).
        vision_heads: See `read_checkpoint`.
        asked: What the node that runs now asks of it, by prompt and node, see `entries`.
    """

    path: Path
    name: str
    identity: str
    precision: str
    plan: Plan
    hidden_size: int
    image_size: int
    tokenizer: SentencePieceProcessor
    vision_heads: int | None
    asked: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @cached_property
    def loaded(self) -> LoadedMllm:
        """The weights, read (with progress) unless another handle of the same content and plan has them."""
        key = (self.identity, self.plan)
        found = _LOADED.get(key)
        if found is None:
            logging.info("MoMA MLLM %s: %s", self.name, self.plan.summary)
            checkpoint = read_checkpoint(self.path, self.vision_heads, read_as_comfyui)
            found = load_checkpoint(checkpoint, self.plan, mllm_device())
            _LOADED[key] = found
        return found


def mllm_device() -> torch.device:
    """Where MLLMs compute: also with --lowvram, which puts text encoders on the CPU, as streaming 7B is far faster."""
    return comfy.model_management.get_torch_device()


def load_mllm(
    path: Path, precision: str = "auto", vision_heads: int | None = None, machine: Machine | None = None
) -> Mllm:
    """Check a LLaVA checkpoint and plan how to run it, without reading its weights.

    Args:
        precision: One of `PRECISIONS`.
        vision_heads: See `read_checkpoint`.
        machine: What it is planned for; this one, measured, where None.

    Raises:
        ValueError: See `read_checkpoint` and `make_plan`.
    """
    checkpoint = read_checkpoint(path, vision_heads)
    identity = checkpoint_identity(path)
    machine = machine or Machine.measure(mllm_device())
    if any(known == identity and plan.cast_once for known, plan in list(_LOADED)):
        machine = replace(machine, holds_cast=True)
    return Mllm(
        path=path,
        name=checkpoint.name,
        identity=identity,
        precision=precision,
        plan=make_plan(precision, dict(_prefixed(checkpoint)), machine),
        hidden_size=checkpoint.language_shape.hidden_size,
        image_size=checkpoint.vision_shape.image_size,
        tokenizer=checkpoint.tokenizer,
        vision_heads=vision_heads,
    )


def read_as_comfyui(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weight file, read as ComfyUI reads its own.

    `.safetensors` go through its loader, for what that does under dynamic VRAM and with `--disable-mmap`. PyTorch's
    files do not: without that option it would read all 14 GB into memory where they can be mapped.

    Raises:
        ValueError: The file is unreadable, or holds code.
    """
    if path.suffix != ".safetensors":
        return read_named_weights(path, mapped=not comfy.utils.DISABLE_MMAP), {}
    with readable(path):
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return tensors, metadata or {}


def load_checkpoint(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> LoadedMllm:
    """Put weights into ComfyUI's memory management, packed or cast as planned: each while the next are read.

    Shows progress and can be cancelled at each weight; then nothing is left.

    Args:
        device: Where it will compute.

    Raises:
        RuntimeError: transformers' models have other weights.
    """
    weights = dict(_prefixed(checkpoint))
    module = MllmModule(checkpoint.language_shape, checkpoint.vision_shape)
    differing = set(module.state_dict()) ^ {key for key in weights if not key.endswith(SCALE_SUFFIX)}
    if differing:
        raise RuntimeError(
            f"This version of transformers builds LLaMA or CLIP in a way that the pack does not know: {min(differing)}."
        )
    use_comfy_leaves(module, plan.compute_dtype, lambda key: _linear(key, weights, plan))
    progress = comfy.utils.ProgressBar(len(weights))
    with ReadAhead([[tensor] for tensor in weights.values()] if plan.storage or plan.cast_once else []) as ahead:
        for number, key in enumerate(weights):
            comfy.model_management.throw_exception_if_processing_interrupted()
            ahead.reached(number)
            _fill(module, key, weights, plan)
            progress.update(1)
    fill_constants(module, checkpoint.language_shape)
    patcher = comfy.model_patcher.CoreModelPatcher(
        module, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
    )
    return LoadedMllm(patcher, plan, Beginnings(patcher))


def _linear(key: str, weights: dict[str, Tensor], plan: Plan) -> type[CastLinear]:
    """What the Linear with this weight becomes; weights with scales are packed in the file."""
    if key + SCALE_SUFFIX in weights and not plan.cast_once:
        return RowScaledLinear
    return PACKED[plan.storage] if plan.storage is not None and is_language_matrix(key) else CastLinear


def _fill(module: MllmModule, key: str, weights: dict[str, Tensor], plan: Plan) -> None:
    """Give one weight to its leaf. Assigned, not copied: a matrix in the file's dtype needs no memory."""
    owner_name, _, name = key.rpartition(".")
    owner, tensor = module.get_submodule(owner_name), weights[key]
    parts = {name: tensor}
    if name == "weight" and isinstance(owner, PackingLinear):
        packed, scale = owner.pack(tensor)
        parts = {"weight": packed, "weight" + SCALE_SUFFIX: scale}
    elif not is_kept(key, weights):
        parts = {name: tensor.to(plan.compute_dtype)}
    elif plan.cast_once and not is_table(key):
        parts = _cast(name, tensor, weights.get(key + SCALE_SUFFIX), plan.compute_dtype)
    for part, value in parts.items():
        setattr(owner, part, nn.Parameter(value, requires_grad=False))


def _cast(name: str, tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """A Linear's weight or bias in the dtype computed in; a packed weight's scales are in it then."""
    if name.endswith(SCALE_SUFFIX):
        return {}
    return {name: cast_in_blocks(tensor, scale, dtype) if tensor.ndim == 2 else tensor.to(dtype)}


def _prefixed(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """All weights by their names in `MllmModule`."""
    for name in ("language", "vision", "projector"):
        for key, value in getattr(checkpoint, name).items():
            yield f"{name}.{key}", value
