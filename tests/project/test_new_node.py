"""`scripts/new_node.py`, in a copy of the repository: what it makes passes the tests of whether a node is complete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_cli.file_utils import list_git_tracked_files

from workbench import ROOT
from workbench.bootstrap import comfyui_path

pytestmark = [pytest.mark.server, pytest.mark.newest, pytest.mark.slow]
COMPLETENESS = (
    "tests/nodes/test_blur_mask.py",
    "tests/nodes/test_contract.py",
    "tests/project/test_docs.py",
    "tests/project/test_house.py",
    "tests/project/test_internals.py",
    "tests/project/test_locales.py",
    "tests/server/test_server.py::test_the_pack_loads_and_keeps_its_contract",
    "tests/server/test_server.py::test_nodes_can_be_found_and_explain_themselves",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as git knows it, or as it lies there where there is no git."""
    target = tmp_path_factory.mktemp("copy") / "ComfyUI-MoMA"
    if names := list_git_tracked_files(ROOT):
        for name in filter(lambda name: (ROOT / name).is_file(), names):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    else:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    return target


def begin(copy: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run the script in the copy."""
    command = [sys.executable, str(copy / "scripts" / "new_node.py"), name]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=utf8(), check=False)


def utf8() -> dict[str, str]:
    """Whatever the machine's own encoding is."""
    return {**os.environ, "PYTHONUTF8": "1", "COMFYUI_PATH": str(comfyui_path())}


def test_a_begun_node_is_complete_but_for_what_it_says(copy: Path) -> None:
    done = begin(copy, "BlurMask")
    assert done.returncode == 0, done.stderr
    assert "MoMABlurMask works" in done.stdout and "screenshots.py nodes" in done.stdout
    # Its picture, which only an editor makes.
    pictures = copy / "web" / "docs" / "images"
    shutil.copyfile(pictures / "MoMASaveSubject.png", pictures / "MoMABlurMask.png")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *COMPLETENESS]
    tests = subprocess.run(
        command, cwd=copy, capture_output=True, encoding="utf-8", env={**utf8(), "UPDATE_SNAPSHOT": "1"}, check=False
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", tests.stdout, re.MULTILINE)
    assert failed == [], tests.stdout
    for locale in ("ja", "ko", "zh"):
        assert f"{locale}, MoMABlurMask does not translate display_name" in tests.stdout
    contract = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/nodes/test_contract.py"]
    asked = subprocess.run(contract, cwd=copy, capture_output=True, encoding="utf-8", env=utf8(), check=False)
    assert re.search("write the line: API contract: `[0-9a-f]{12}`", asked.stdout), asked.stdout
    again = begin(copy, "BlurMask")
    assert again.returncode == 1 and "there is nodes/blur_mask.py already" in again.stderr


@pytest.mark.parametrize("name", ["MoMABlur", "blur", "Blur-Mask", "../Blur"])
def test_a_name_of_another_form_is_refused(copy: Path, name: str) -> None:
    before = sorted(copy.rglob("*.py"))
    done = begin(copy, name)
    assert done.returncode == 1 and f"error: NAME: '{name}' is not of the form BlurMask" in done.stderr
    assert sorted(copy.rglob("*.py")) == before
