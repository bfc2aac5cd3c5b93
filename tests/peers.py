"""Real code of other packs, fetched at test time where that is possible."""

import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_source import cache_dir

SECONDS = 60
CODE = ("*.py", "*.json", "*.toml", "*.txt", "*.yaml")
NOT_FETCHED = "cannot fetch"
_unreachable: list[str] = []
"""Why the network is not asked any more."""


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


def peer_module(owner: str, name: str, module: str, **given: Any) -> ModuleType:
    """One module of a pack, without what the pack's own start would import; skipped as `peer_pack` is.

    `given`: what the module looks up in that start.
    """
    folder = peer_folder(owner, name)
    package = f"peer_part_{name}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
        vars(sys.modules[package]).update(given)
    return importlib.import_module(f"{package}.{module}")


def apart(work: Callable[[], Any]) -> Any:
    """The result of `work()` in a copy of this process, which takes with it whatever other packs do to ComfyUI."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot copy a process")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)  # the other threads are not copied
        try:
            sender.send((True, work()))
        except pytest.skip.Exception as skipped:
            sender.send((False, str(skipped)))
        except ModuleNotFoundError as missing:
            sender.send((False, f"the pack needs {missing.name}"))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        done, result = receiver.recv()
    except EOFError:
        pytest.fail("the other process failed, see its output")
    finally:
        process.join()
    if not done:
        if result.startswith(NOT_FETCHED):
            _unreachable.append(result)
        pytest.skip(result)
    return result


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
    """The newest code of a pack, without its pictures. Several test runs may do this at once; the first one's is kept.

    Once the network has failed it is not asked again.
    """
    if _unreachable:
        pytest.skip(f"{url} was not asked for: {_unreachable[0]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            clone = f"{place}/{folder.name}"
            _git(["clone", "--quiet", "--depth", "1", "--filter=blob:none", "--no-checkout", url, clone])
            _git(["-C", clone, "sparse-checkout", "set", "--no-cone", *CODE])
            _git(["-C", clone, "checkout", "--quiet"])
            with suppress(OSError):
                Path(clone).rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{NOT_FETCHED} {url}: {error}")


def _git(command: list[str]) -> None:
    never_ask = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    subprocess.run(["git", *command], env=never_ask, capture_output=True, check=True, timeout=SECONDS)
