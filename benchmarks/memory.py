"""Memory as the user's machine runs out of it: the GPU's if there is one, else the process's resident memory."""

import ctypes
import gc
from collections.abc import Mapping
from pathlib import Path

import torch
from measure import Step

MIB = 2**20
_PAGE = 1 / 256
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryMeter:
    """High-water mark since the last reset.

    On a CPU this reads Linux's own marks; the pages of memory-mapped files count as long as they are resident.
    """

    def __init__(self) -> None:
        """Start from here.

        Raises:
            RuntimeError: Neither a GPU nor Linux with glibc.
        """
        self.cuda = torch.cuda.is_available()
        if not self.cuda and not (_RESET.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")):
            raise RuntimeError("Without a GPU, memory can be measured on Linux with glibc only.")
        self.reset()

    def reset(self) -> None:
        """Forget earlier peaks, and give back what was freed but kept for later."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            _RESET.write_text("5", encoding="ascii")

    def now_mb(self) -> float:
        """MiB in use."""
        return torch.cuda.memory_allocated() / MIB if self.cuda else _status("VmRSS")

    def peak_mb(self) -> float:
        """The most MiB in use since the last reset."""
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else _status("VmHWM")


def memory_of_steps(steps: Mapping[str, Step]) -> dict[str, float]:
    """`plain_mb`: how far memory rises during a step; the others as ratios to that."""
    meter = MemoryMeter()
    rises = {}
    for name, step in steps.items():
        meter.reset()
        before = meter.now_mb()
        step()
        rises[name] = meter.peak_mb() - before
    plain = max(rises.pop("plain"), _PAGE)
    return {"plain_mb": plain, **{name: rise / plain for name, rise in rises.items()}}


def _status(name: str) -> float:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024
