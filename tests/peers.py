"""Real code of other packs, fetched at test time where that is possible."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from comfyui_source import cache_dir

SECONDS = 60


def peer_pack(owner: str, name: str) -> ModuleType:
    """A pack, imported as ComfyUI does: from `$COMFYUI_MOMA_PEERS/NAME`, else from GitHub (kept in the cache).

    Where neither has it, the test is skipped.
    """
    module = f"peer_{name}"
    if module in sys.modules:
        return sys.modules[module]
    folder = peer_folder(owner, name)
    start = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(module, start, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def peer_folder(owner: str, name: str) -> Path:
    """Where a pack's code is; for packs of which a test imports a part."""
    given = os.environ.get("COMFYUI_MOMA_PEERS")
    folder = Path(given or cache_dir() / "peers") / name
    if not given and not folder.is_dir():
        _clone(f"https://github.com/{owner}/{name}", folder)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def _clone(url: str, folder: Path) -> None:
    """Several test runs may do this at once; the first one's is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    never_ask = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        command = ["git", "clone", "--quiet", "--depth", "1", url, f"{place}/{folder.name}"]
        try:
            subprocess.run(command, env=never_ask, capture_output=True, check=True, timeout=SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{url} cannot be fetched: {error}")
        with suppress(OSError):
            Path(place, folder.name).rename(folder)
