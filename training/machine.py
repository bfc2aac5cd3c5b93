"""Where training computes, and in what precision: by accelerate where it is installed, else by torch alone."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INSTALL = "Install it beside ComfyUI: pip install accelerate."


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        dtype: Of frozen weights and of what is computed; what is trained is float32 all the same.
        accelerator: accelerate's, or None.
    """

    device: torch.device
    dtype: torch.dtype
    accelerator: Any

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes in `dtype` what may be."""
        if self.accelerator is not None:
            return self.accelerator.autocast()
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def find_machine(precision: str | None, device: torch.device) -> Machine:
    """The machine for this precision (None: bf16 on a GPU that has it, else fp32).

    Raises:
        ValueError: The precision needs accelerate, which is not installed; or several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Several processes were started, but the adapter trains on one device. Start it by itself.")
    if precision is None:
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    try:
        from accelerate import Accelerator
    except ImportError:
        if precision == "fp16":
            raise ValueError(
                f"fp16 needs accelerate, which scales the loss, and it is not installed. {_INSTALL}"
            ) from None
        print(f"accelerate is not installed: going on with torch alone, on {device} in {precision}.", flush=True)
        return Machine(device, PRECISIONS[precision], None)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
    return Machine(accelerator.device, PRECISIONS[precision], accelerator)
