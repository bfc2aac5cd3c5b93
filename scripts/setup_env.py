"""Gets a real ComfyUI and a Python that can run it and the tests: `python3 scripts/setup_env.py [VERSION ...]`.

Needs only Python 3.10 or newer with pip. What it fetches lies in `$COMFYUI_MOMA_CACHE`, else in
`$XDG_CACHE_HOME/comfyui-moma`, else in `~/.cache/comfyui-moma`; a second run finds it there at once.
A ComfyUI of the user's own, and its Python, are used as they are and never changed.
"""

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from comfyui_source import (
    CARRIER_VERSIONS,
    NEWEST,
    ROOT,
    SetupError,
    cache_dir,
    find_comfyui,
    in_utf8,
    own_comfyui,
    run,
)

# ComfyUI leaves these unpinned; this trio is one that fits together.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
RAY = "ray[client]==2.60.0"
PYARROW = "pyarrow==22.0.0"
STAMP = "comfyui-moma.stamp"
LOCAL = "127.0.0.1,localhost"
PROBE = """
import sys, torch
from importlib.metadata import version
from packaging.requirements import Requirement
for line in sys.argv[1:]:
    wanted = Requirement(line)
    if not wanted.specifier.contains(version(wanted.name), prereleases=True):
        sys.exit(f"{line} is needed, {version(wanted.name)} is there")
"""
"""Fails unless the requirements on its command line are met; its last line of error output then says why."""


class Environment(NamedTuple):
    """A ComfyUI and a Python that can run it, the pack's tests and linters."""

    name: str
    comfyui: Path
    python: Path

    def variables(self) -> dict[str, str]:
        """What its processes get: where ComfyUI lies, and where Python and mypy keep what they compile and found out.

        Containers often have Python keep nothing, and a server then compiles for 20 s at each start. A proxy is for
        other hosts.
        """
        inherited = {name: value for name, value in in_utf8().items() if name != "PYTHONDONTWRITEBYTECODE"}
        kept = {"PYTHONPYCACHEPREFIX": str(cache_dir() / "bytecode"), "MYPY_CACHE_DIR": str(cache_dir() / "mypy")}
        unproxied = ",".join(filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY")), LOCAL]))
        return {**inherited, **kept, "no_proxy": unproxied, "NO_PROXY": unproxied, "COMFYUI_PATH": str(self.comfyui)}


def ensure_venv(comfyui: Path, version: str, extras: Sequence[str] = ()) -> Path:
    """The Python of the cache's virtual environment for this ComfyUI, made anew unless it is up to date.

    Args:
        comfyui: The ComfyUI whose requirements.txt it gets.
        version: Names the environment.
        extras: Further requirements.

    Raises:
        SetupError: It cannot be made.
    """
    venv = cache_dir() / f"venv-{version}"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    requirements = comfyui / "requirements.txt"
    stamp = _digest([*TORCH, requirements.read_text(encoding="utf-8"), *extras])
    stamp_file = venv / STAMP
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp and _succeeds(python, "-c", ""):
        return python
    print(f"Making the Python environment for ComfyUI {version} in {venv}, a download of some GB.", flush=True)
    installer = _make_venv(venv, python)
    _install(installer, python, [*TORCH, "-r", str(requirements), *extras])
    run([python, "-c", "import torch"], f"All was installed, but {python} does not find it or cannot load it.")
    stamp_file.write_text(stamp, encoding="utf-8")
    return python


def ensure_ray() -> Path:
    """The Python of an environment with Ray alone, as its users have it: ComfyUI's gets nothing of Ray's.

    Raises:
        SetupError: It cannot be made.
    """
    return _ensure_plain("venv-ray", RAY)


def ensure_pyarrow() -> Path:
    """The Python of an environment with pyarrow alone, for tables in Parquet.

    Raises:
        SetupError: It cannot be made.
    """
    return _ensure_plain("venv-pyarrow", PYARROW)


def _ensure_plain(name: str, requirement: str) -> Path:
    venv = cache_dir() / name
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp_file, stamp = venv / STAMP, _digest([requirement, sys.version])
    if not (stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp and _succeeds(python, "-c", "")):
        _install(_make_venv(venv, python), python, [requirement])
        stamp_file.write_text(stamp, encoding="utf-8")
    return python


def dev_requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """The dependency group `dev`: a list of plain strings, which Python reads alike (3.10 has no TOML reader)."""
    found = re.search(r"^dev = (\[.*?\])$", pyproject.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not found:
        raise SetupError(f"{pyproject} has no dependency group `dev = [...]`.")
    return [str(requirement) for requirement in ast.literal_eval(found[1])]


def environment(version: str | Path | None = None, pins: Sequence[str] = ()) -> Environment:
    """This version of ComfyUI, or the one in this folder (as in `find_comfyui`), with a Python for it.

    Args:
        pins: Further requirements, as in "transformers==4.50.3"; each set of them gets an environment of its own.

    Raises:
        SetupError: Something cannot be fetched or made.
    """
    comfyui = find_comfyui(version)
    if isinstance(version, Path) or (version is None and comfyui == own_comfyui()):
        name = f"own-{_digest([str(comfyui), *pins])[:8]}"
        python = None if pins else _own_python(comfyui)
        return Environment(str(comfyui), comfyui, python or ensure_venv(comfyui, name, [*dev_requirements(), *pins]))
    name = "-".join([version or NEWEST, *(pin.replace("==", "-") for pin in pins)])
    return Environment(name, comfyui, ensure_venv(comfyui, name, [*dev_requirements(), *pins]))


def _digest(parts: Sequence[str]) -> str:
    # What the locale cannot read of a path is in it as surrogates.
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def _succeeds(*command: str | Path) -> bool:
    try:
        words = [str(part) for part in command]
        return subprocess.run(words, env=in_utf8(), capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _make_venv(venv: Path, python: Path) -> list[str]:
    """A new virtual environment in place of any old one; the command that installs there."""
    # This script may itself run in the environment that it makes anew: then its own Python goes.
    outside = Path(sys.prefix).resolve() != venv.resolve()
    base = sys.executable if outside else str(Path(sys.base_prefix) / Path(sys.executable).relative_to(sys.prefix))
    shutil.rmtree(venv, ignore_errors=True)
    uv = shutil.which("uv")
    if uv and _succeeds(uv, "venv", "-q", "--python", base, venv):
        return [uv, "pip", "install", "--python", str(python)]
    advice = "On Debian and Ubuntu, `apt-get install python3-venv` may be missing; `pip install uv` helps everywhere."
    run([base, "-m", "venv", "--clear", venv], f"No virtual environment could be made. {advice}")
    pip = [str(python), "-m", "pip", "install", "-q"]
    if _succeeds(*pip, "uv"):
        return [str(python), "-m", "uv", "pip", "install", "--python", str(python)]
    print("uv could not be installed: going on with pip, which is slower.", flush=True)
    return pip


def _install(installer: Sequence[str], python: Path, requirements: Sequence[str]) -> None:
    """Install with this installer, or with the environment's own pip should that fail."""
    failure = f"The requirements could not be installed for {python}. Check the network and the free disk space."
    try:
        run([*installer, *requirements], failure)
    except SetupError:
        if "uv" not in installer or not _succeeds(python, "-m", "pip", "--version"):
            raise
        print("uv failed: trying again with pip.", flush=True)
        run([python, "-m", "pip", "install", *requirements], failure)


def _own_python(comfyui: Path) -> Path | None:
    """`COMFYUI_PYTHON`, or this Python, if all that ComfyUI needs is there, and the tests' tools in their versions."""
    named = os.environ.get("COMFYUI_PYTHON")
    # Not resolved: the link itself makes a virtual environment's Python.
    python = Path(named or sys.executable).expanduser().absolute()
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [found[0] for line in lines if (found := re.match(r"[A-Za-z0-9._-]+", line.strip()))]
    command = [python, "-c", PROBE, *names, *dev_requirements()]
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if result.returncode == 0:
            return python
        lack = result.stderr.strip().rpartition("\n")[2]
    except OSError as error:
        lack = str(error)
    print(f"{python} lacks something that {comfyui} or the tests need, and stays as it is: {lack}")
    print("Going on with an environment in the cache; COMFYUI_PYTHON can name another Python.", flush=True)
    return None


def main() -> None:
    """Set up what the command line names and print where it lies."""
    parser = argparse.ArgumentParser(description="Get a ComfyUI and a Python environment for it and the tests.")
    help_ = f"{', '.join(CARRIER_VERSIONS)}; without one, your own ComfyUI if there is one, else {NEWEST}"
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=help_)
    try:
        for version in parser.parse_args().versions or [None]:
            found = environment(version)
            print(f"ComfyUI {found.name}\n  COMFYUI_PATH={found.comfyui}\n  Python: {found.python}", flush=True)
    except SetupError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
