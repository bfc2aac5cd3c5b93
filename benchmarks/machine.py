"""What was measured on, and which versions."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from comfyui_source import ROOT


def machine(dtype: torch.dtype) -> dict[str, Any]:
    """Processor, GPU, versions and the attention in use. ComfyUI must be importable."""
    import comfy.ldm.modules.attention
    import comfyui_version

    pack = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pack is not None
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": comfyui_version.__version__,
        "pack": pack[1],
        "dtype": str(dtype).removeprefix("torch."),
        "attention": comfy.ldm.modules.attention.optimized_attention.__name__.removeprefix("attention_"),
    }


def processor() -> str:
    """What the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
