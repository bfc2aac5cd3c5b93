"""A graphics card that is not there, for counting memory: tensors with a device and a size, but no content.

ComfyUI's patcher and the whole forward run on it as they are. torch itself refuses an operation whose operands are on
two devices, as a card would.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from comfyui_moma.moma_modules.mllm.checkpoint import Checkpoint

CARD = torch.device("cuda:0")


@dataclass
class Usage:
    """What happened on the card: bytes in use now and at most, and how often each operation ran there."""

    current: int = 0
    peak: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    _tensors: Counter[int] = field(default_factory=Counter)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory until the last tensor that shares it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not isinstance(size, int):
            return  # a handful of outlier columns, whose number depends on content
        if not self._tensors[key]:
            self.current += size
            self.peak = max(self.peak, self.current)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            self.current -= size


class _Watch(TorchDispatchMode):
    def __init__(self, usage: Usage) -> None:
        super().__init__()
        self._usage = usage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, FakeTensor) and leaf.device == CARD]
        for output in outputs:
            self._usage.add(output)
        if outputs:
            self._usage.operations[str(func)] += 1
        return result


def _move(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` with new parameters: torch's own would exchange the tensors' content, which fakes do not have."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(fn(parameter), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


@contextmanager
def fake_card() -> Iterator[Usage]:
    """Within it tensors are fake, on the CPU unless moved to `CARD`; gives what is used there."""
    usage = Usage()
    with (
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(torch.nn.Module, "_apply", _move),
        FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True),
        _Watch(usage),
        torch.no_grad(),
    ):
        yield usage


def without_content(checkpoint: "Checkpoint") -> "Checkpoint":
    """The same weights, within `fake_card` as fake tensors on the CPU."""
    parts = ("language", "vision", "projector")
    return replace(
        checkpoint,
        **{
            part: {key: torch.empty_like(value, device="cpu") for key, value in getattr(checkpoint, part).items()}
            for part in parts
        },
    )


def managed(monkeypatch: pytest.MonkeyPatch, usage: Usage, size: int) -> None:
    """Let ComfyUI load to and offload from the fake card by what is free of `size` bytes."""

    def free(device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        left = 10**12 if device is not None and device.type == "cpu" else size - usage.current
        return (left, 0) if torch_free_too else left

    management = comfy.model_management
    monkeypatch.setattr(management, "get_free_memory", free)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)


class _Unet(torch.nn.Module):
    """As many values as SD1.5's UNet has, 860 million; nothing is computed with them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        make = comfy.ops.manual_cast.Linear
        self.layers = torch.nn.ModuleList(make(8600, 10000, bias=False, dtype=torch.float16) for _ in range(10))


def unet_without_content() -> comfy.model_patcher.ModelPatcher:
    """Something as large as SD1.5's UNet in fp16, for the fake card."""
    return comfy.model_patcher.CoreModelPatcher(_Unet(), CARD, torch.device("cpu"))
