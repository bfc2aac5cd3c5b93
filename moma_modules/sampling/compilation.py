"""TorchCompileModel on a model with MoMA: the run compiles the UNet itself, with all of torch's checks.

ComfyUI's node compiles without checks on the transformer options, where a run's patches and masks are: a UNet compiled
that way goes on with those of its first step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS, apply_torch_compile_factory

from ..host.messages import warn

_UNET = "diffusion_model"
_MARK = {"moma_compiled": True}
"""An argument that the UNet ignores, so that torch never takes ComfyUI's unchecked compilation for one of ours."""


class Compilation:
    """The UNet of one run, compiled as a whole. Torch keeps what it compiled for later runs of the same kind."""

    def __init__(self, unet: Any, arguments: dict[str, Any]) -> None:
        """`arguments`: those of `torch.compile`, from the node that wants it."""
        options = {name: value for name, value in (arguments["options"] or {}).items() if name != "guard_filter_fn"}
        # All or nothing: in pieces, all layers are the same few functions, which torch compiles again and again.
        compiled = torch.compile(unet, **{**arguments, "options": options or None, "fullgraph": True})
        self._compiled: Callable[..., Any] | None = apply_torch_compile_factory({_UNET: compiled})

    @property
    def active(self) -> bool:
        """Whether forwards are compiled; no longer once one could not be."""
        return self._compiled is not None

    def run(self, forward: Callable[[Callable[..., Any]], Any], executor: Any) -> Any:
        """`forward(model)`, where `model` takes the arguments of `executor` and computes the same, compiled."""
        if self._compiled is not None:
            try:
                return forward(partial(self._compiled, executor, **_MARK))
            except _refusals() as error:
                self._compiled = None
                reason = str(error).strip().partition("\n")[0]
                warn(
                    "MoMA: this run goes on without TorchCompileModel, as torch cannot compile all of it at once "
                    f"({reason}). The picture is right, and as fast as without that node."
                )
        return forward(executor)


def take_compilation(patcher: Any, model_options: dict[str, Any]) -> Compilation | None:
    """Take TorchCompileModel's wrapper out of a run's own options; None if there is none."""
    wrappers = model_options["transformer_options"].get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if wrappers.pop(COMPILE_KEY, None) is None:
        return None
    return Compilation(patcher.get_model_object(_UNET), model_options[TORCH_COMPILE_KWARGS])


def _refusals() -> tuple[type[Exception], ...]:
    """What torch raises where it cannot compile, or has compiled too many kinds. Importing it takes seconds."""
    from torch._dynamo import exc

    return exc.Unsupported, getattr(exc, "FailOnRecompileLimitHit", exc.Unsupported)
