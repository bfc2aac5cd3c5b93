"""Editors of several versions, each of a server of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import SETTINGS, Editor, open_browser, open_editor
from comfyui_source import SetupError
from frontends import find_frontend

from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer


@contextmanager
def editor_of(
    frontend: str | None, base: Path, models: dict[str, Path] | None = None
) -> Iterator[tuple[ComfyServer, Editor]]:
    """A server of the pack, and an editor of it; skips the test if that cannot be fetched.

    Args:
        frontend: The editor's version; None: the one that this ComfyUI brings.
        base: The server's folder.
        models: See `ComfyServer`.
    """
    arguments = ["--cpu"]
    if frontend is not None:
        try:
            arguments += ["--front-end-root", str(find_frontend(frontend))]
        except SetupError as error:
            pytest.skip(str(error))
    with ComfyServer(comfyui_path(), base, models, arguments) as server, open_browser() as browser:
        server.post("/settings", SETTINGS)
        with open_editor(browser, server.address) as editor:
            yield server, editor
