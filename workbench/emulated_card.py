"""Two graphics cards that are not there: tensors that say they are on one, and whose values lie in CPU memory.

What runs on them is the real code with real results. Operands on two devices are refused with torch's own message, also
between the two cards; what would make the host wait for a card is noted with where it was asked for. There are no
kernels and no streams, and memory is not counted (`fake_device` does that, without values).
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import ROOT
from .bootstrap import comfyui_path

SECOND = torch.device("cuda:1")

STEP = "outer_predict_noise"
"""The function of ComfyUI's within which one evaluation of the model happens."""

_OURS = tuple(str(ROOT / name) for name in ("moma_modules", "nodes"))
_TOOLS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__)),
    *(
        str(comfyui_path() / "comfy" / name)
        for name in ("ops.py", "utils.py", "model_management.py", "conds.py", "ldm/modules/attention.py")
    ),
)
"""Code that only does what its caller wants: what it runs is the caller's."""

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "is_nonzero"}
"""Operations whose result, or its shape, the host must know."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_BRIDGES = {"copy_", "_to_copy", *_INDEXING}
"""Those that torch lets have operands on a card and on the CPU."""
_WHOLE = {"scaled_dot_product_attention"}
"""Not taken apart: a card has kernels of its own for them."""

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Wait:
    """Something for which the host waits until the card has done all that it was given.

    Attributes:
        what: The operation, or the way of a copy.
        site: File and function that asked for it.
        ours: Whether that is the pack's code.
        in_step: Whether it was within an evaluation of the model.
    """

    what: str
    site: str
    ours: bool
    in_step: bool


@dataclass
class Record:
    """What happened on the cards.

    Attributes:
        waits: How often the host waited, and where.
        calls: Names of the torch operations that the pack's own code called there, and where it did first.
        kernels: Those that were run for them.
        promotions: Operations of the pack's on floating-point operands of several dtypes, and where.
        dtypes: What operands each of these kernels had.
    """

    waits: Counter[Wait] = field(default_factory=Counter)
    calls: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    promotions: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)

    def ours(self, in_step: bool) -> Counter[str]:
        """The pack's waits within or outside of steps: "what at site" and how often."""
        return self._found(lambda wait: wait.ours and wait.in_step == in_step)

    def others(self) -> Counter[str]:
        """Everybody else's."""
        return self._found(lambda wait: not wait.ours)

    def _found(self, wanted: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        for wait, count in self.waits.items():
            if wanted(wait):
                found[f"{wait.what} at {wait.site}"] += count
        return found


class OnCard(torch.Tensor):
    """A tensor that says it is on a card."""

    _values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> "OnCard":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        made._values = values
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnCard({self._values!r}, {self.device})"

    def untyped_storage(self) -> Any:
        """Of the values, so that sharing can be seen."""
        return self._values.untyped_storage()

    def tolist(self) -> Any:
        """As torch's own, through the CPU."""
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As torch's own."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        """Of the values."""
        return self._values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a card that is gone: the emulation has ended.")


class _Cards(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record
        self._within_call = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [part for part in _parts(args, kwargs) if isinstance(part, torch.Tensor)]
        if not any(isinstance(tensor, OnCard) for tensor in tensors) and not any(map(_is_card, _parts(args, kwargs))):
            return func(*args, **kwargs)
        operation = _operation(func)
        frame = sys._getframe(1)
        site, ours = _asked_by(frame)
        if ours and not self._within_call:
            self._record.calls.setdefault(operation.name, site)
        if operation.composite:
            return self._taken_apart(func, args, kwargs)
        device = _result_device(operation.name, tensors, args, kwargs)
        what = _wait(operation.name, args, kwargs, device)
        if what is not None:
            self._record.waits[Wait(what, site, ours, _within(frame, STEP))] += 1
        if ours:
            self._note(operation.name, site, tensors)
        return _computed(func, operation, args, kwargs, device)

    def _taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that is made of others: these come back here."""
        outer, self._within_call = self._within_call, True
        try:
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        finally:
            self._within_call = outer

    def _note(self, name: str, site: str, tensors: list[torch.Tensor]) -> None:
        self._record.kernels.setdefault(name, site)
        self._record.dtypes.setdefault(name, set()).update(tensor.dtype for tensor in tensors)
        floats = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.ndim}
        if len(floats) > 1 and name not in _BRIDGES:
            self._record.promotions.setdefault(name, site)


@contextmanager
def emulated_cards() -> Iterator[Record]:
    """Within it, `CARD` and `SECOND` are devices like others; what was there then is of no use afterwards."""
    record = Record()
    statistics: Counter[str] = Counter()
    replace = torch.__future__.get_overwrite_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    if torch.cuda.is_available():
        torch.cuda.init()  # or torch would take the real card for ready after what follows
    torch._C._ensureCUDADeviceGuardSet()  # as torch's own fake tensors do on a machine without a card; it stays set
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` with a device is made on the CPU, then moved
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module that moves gets other parameters
    try:
        with (
            mock.patch.multiple(
                torch.cuda,
                _lazy_init=lambda: None,
                current_device=lambda: 0,
                set_device=lambda _: None,
                synchronize=lambda *_: None,
                memory_stats=lambda *_: statistics,
                mem_get_info=lambda *_: (1 << 34, 1 << 34),
            ),
            mock.patch.object(torch, "Generator", _generator(torch.Generator)),
            mock.patch.object(torch, "tensor", _tensor(torch.tensor)),
            _Cards(record),
        ):
            yield record
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(replace)
        torch._C._set_only_lift_cpu_tensors(lift)


def _generator(real: Any) -> Any:
    """A card's random numbers come from a generator of the CPU's."""
    return lambda device="cpu": real("cpu" if _is_card(torch.device(device)) else device)


def _tensor(real: Any) -> Any:
    """`torch.tensor` reads numbers in a list past everything that could tell it where they are."""

    def numbers(data: Any) -> Any:
        if isinstance(data, list | tuple):
            return [numbers(member) for member in data]
        return data.item() if isinstance(data, OnCard) and data.ndim == 0 else data

    return lambda data, *args, **kwargs: real(numbers(data), *args, **kwargs)


def _is_card(thing: Any) -> bool:
    return isinstance(thing, torch.device) and thing.type == "cuda"


@dataclass(frozen=True)
class _Operation:
    """What its schema says of an operation.

    Attributes:
        composite: Whether it is made of other operations, which are dispatched themselves.
        written: Which arguments it gives back after writing to them: positions or names; None if it makes new ones.
    """

    name: str
    composite: bool
    written: tuple[Any, ...] | None


@cache
def _operation(func: Any) -> _Operation:
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
    places = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    gives_back = any(value.alias_info is not None and value.alias_info.is_write for value in schema.returns)
    return _Operation(name, composite and name not in _WHOLE, places if gives_back else None)


def _parts(*arguments: Any) -> Iterator[Any]:
    """Arguments, and the members of those that are lists or dictionaries."""
    for argument in arguments:
        if isinstance(argument, list | tuple | dict):
            yield from _parts(*(argument.values() if isinstance(argument, dict) else argument))
        else:
            yield argument


def _result_device(name: str, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> torch.device:
    """Where the result is; refuses what torch would refuse."""
    wanted = kwargs.get("device")
    if name == "copy_":
        return args[0].device
    # A number on the CPU may meet tensors on a card, but not the other way round.
    places = {tensor.device for tensor in tensors if tensor.device.type == "cuda" or tensor.ndim}
    if name in _BRIDGES:
        places = {args[0].device, *(place for place in places if place.type == "cuda")}
    if len(places) > 1:
        first, second = sorted(map(str, places))[:2]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}! "
            f"(when checking the arguments of {name})"
        )
    if wanted is not None:
        return torch.device(wanted)
    return places.pop() if places else torch.device("cpu")


def _computed(func: Any, operation: _Operation, args: Any, kwargs: Any, device: torch.device) -> Any:
    options = {name: _on_cpu(value) for name, value in kwargs.items() if name != "pin_memory"}
    result = func(*map(_on_cpu, args), **options)
    if operation.written is None:
        return _put(result, device)
    given = tuple(kwargs[place] if isinstance(place, str) else args[place] for place in operation.written)
    for tensor in given:
        if isinstance(tensor, OnCard) and tensor.shape != tensor._values.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor on an emulated card.")
    return given[0] if len(given) == 1 else given


def _on_cpu(part: Any) -> Any:
    if isinstance(part, OnCard):
        return part._values
    if isinstance(part, list | tuple):
        return [_on_cpu(member) for member in part]
    return torch.device("cpu") if _is_card(part) else part


def _put(part: Any, device: torch.device) -> Any:
    if isinstance(part, list | tuple):
        return type(part)(_put(member, device) for member in part)
    return OnCard(part, device) if isinstance(part, torch.Tensor) and device.type == "cuda" else part


def _wait(name: str, args: Any, kwargs: Any, device: torch.device) -> str | None:
    """What the host waits for in this operation, if it does."""
    if name in _READS:
        return name
    if name in _INDEXING:
        places = [place for place in args[1] if place is not None]
        # Writing one value through a mask is a kernel of its own; all else must count the places first.
        if any(place.dtype == torch.bool for place in places) and (name == "index" or args[2].numel() > 1):
            return f"{name} by a mask"
        return f"{name} by places on the CPU" if any(place.device.type == "cpu" for place in places) else None
    if name not in ("copy_", "_to_copy"):
        return None
    source = args[0] if name == "_to_copy" else args[1]
    non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
    return None if source.device == device or non_blocking else f"{source.device.type} to {device.type}"


def _asked_by(frame: FrameType | None) -> tuple[str, bool]:
    """File and function that wanted an operation, and whether that is the pack's code."""
    while frame is not None:
        owner = _owner(frame.f_code)
        if owner is not None:
            return owner
        frame = frame.f_back
    return "?", False


@cache
def _owner(code: CodeType) -> tuple[str, bool] | None:
    file = code.co_filename
    if file.startswith((*_TOOLS, "<")):
        return None
    ours = file.startswith(_OURS)
    with suppress(ValueError):
        file = Path(file).relative_to(ROOT if ours else comfyui_path()).as_posix()
    return f"{file}:{code.co_name}", ours


def _within(frame: FrameType | None, function: str) -> bool:
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
