"""Makes a real ComfyUI and the pack importable, as ComfyUI itself would import it."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from . import ROOT

PACK = "comfyui_moma"
AT_START: set[str] = set()
"""The modules that are imported once ComfyUI has the pack's nodes, before any of them has run."""


def comfyui_path() -> Path:
    """`COMFYUI_PATH`, or the ComfyUI in whose custom_nodes the pack lies.

    Raises:
        SystemExit: There is neither.
    """
    for path in (os.environ.get("COMFYUI_PATH"), ROOT.parent.parent):
        if path and (Path(path) / "comfy" / "model_patcher.py").is_file():
            return Path(path)
    raise SystemExit("No ComfyUI found: set COMFYUI_PATH to one, or run `python3 scripts/test.py`, which gets one.")


def bootstrap() -> None:
    """Put ComfyUI first on the path (its `nodes` is not ours) and import the pack as `comfyui_moma`."""
    if PACK in sys.modules:
        return
    sys.path.insert(0, str(comfyui_path()))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = package
    spec.loader.exec_module(package)
    asyncio.run(_load(package))
    AT_START.update(sys.modules)


async def _load(package: Any) -> None:
    extension = await package.comfy_entrypoint()
    await extension.on_load()
