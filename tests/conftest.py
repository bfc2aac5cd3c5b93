"""Every test runs against a real ComfyUI, see `bootstrap`; those of the editor need Chromium.

`model`, `adapter` and `subject` are the small scene that most tests of sampling start from.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium_path

from workbench.bootstrap import bootstrap

NO_CHROMIUM = (
    "The tests of the editor were left out: no Chromium. On Debian: apt-get install chromium; or set CHROMIUM."
)


def pytest_configure(config: pytest.Config) -> None:
    """Import ComfyUI and the pack, but not into a process that only hands out the tests to others."""
    hands_out = config.getoption("tx", None) and not config.getoption("collectonly")
    if hasattr(config, "workerinput") or not hands_out:
        try:
            bootstrap()
        except SystemExit as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="module")
def model() -> Any:
    from workbench.tiny_models import tiny_model

    return tiny_model()


@pytest.fixture(scope="module")
def adapter() -> Any:
    from workbench.scene import tiny_adapter

    return tiny_adapter()


@pytest.fixture(scope="module")
def subject(adapter: Any) -> Any:
    from workbench.scene import tiny_subject

    return tiny_subject(adapter)


@pytest.fixture(scope="module")
def full(model: Any, adapter: Any, subject: Any) -> Any:
    """The MODEL with both parts of MoMA on it."""
    from workbench.scene import moma, tiny_shortcut

    return moma(model, adapter, subject, shortcut=tiny_shortcut())


@pytest.fixture(scope="module")
def expected(full: Any, subject: Any) -> Any:
    """What that gives when nobody else is on it."""
    from workbench.scene import run

    return run(full, subject)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB: a file system of its own, which only some users may make."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the browser tests out where there is no browser; CI must have one, and they fail there without."""
    if chromium_path() is not None or os.environ.get("CI"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        config.stash[_LEFT_OUT] = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out."""
    if config.stash.get(_LEFT_OUT, False):
        terminalreporter.write_line(NO_CHROMIUM)


_LEFT_OUT = pytest.StashKey[bool]()
