"""The commands and the program of docs/api.md, as they stand there, against a real server."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from workflow_files import photographs, small

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError
from workbench.small_world import in_small_world

pytestmark = [pytest.mark.server, pytest.mark.slow]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PHOTO = ROOT / "workbench" / "photo" / "photo_masked.png"


def block(language: str) -> str:
    """The page's one block of code in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page says is there: the graph, in the small world, and the photograph."""
    path = tmp_path_factory.mktemp("client")
    prompt = small(in_small_world(photographs("new_context")))
    next(node for node in prompt.values() if node["class_type"] == "LoadImage")["inputs"]["image"] = "example.png"
    (path / "new_context.json").write_text(json.dumps(prompt), encoding="utf-8")
    shutil.copyfile(PHOTO, path / "photo.png")
    (path / "personalize.py").write_text(block("python"), encoding="utf-8")
    return path


def program(folder: Path, server: ComfyServer, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the page's program."""
    command = [sys.executable, "personalize.py", *words, "--server", server.address, "--size", "128", "--steps", "1"]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_curl_and_python_give_the_same_picture(server: ComfyServer, folder: Path) -> None:
    variables = {**os.environ, "COMFYUI": server.address}
    result = subprocess.run(
        ["bash", "-e", "-c", block("bash")],
        cwd=folder,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ran = program(folder, server, "photo.png", "cup", "A cup on a beach.", "out.png")
    assert ran.returncode == 0 and ran.stdout == "Wrote out.png\n", ran.stdout + ran.stderr
    first, second = pixels(folder / "picture.png"), pixels(folder / "out.png")
    assert first.shape == (128, 128, 3) and first.std() > 1 and np.array_equal(first, second)


def test_errors_while_it_runs_are_the_nodes_own_words(server: ComfyServer, folder: Path) -> None:
    ran = program(folder, server, "photo.png", "", "A cup.", "none.png")
    assert ran.returncode == 1 and not (folder / "none.png").exists()
    prompt = json.loads((folder / "new_context.json").read_text(encoding="utf-8"))
    next(n for n in prompt.values() if n["class_type"] == "MoMAExtractSubject")["inputs"]["subject"] = ""
    with pytest.raises(ExecutionFailedError) as failure:
        server.run(prompt)
    assert ran.stderr.strip() == str(failure.value).strip()
    assert ran.stderr.startswith("MoMAExtractSubject: subject is empty: give the word for what is in the picture")


def test_errors_before_it_runs_are_the_nodes_own_words(server: ComfyServer, folder: Path) -> None:
    bad = json.loads((folder / "new_context.json").read_text(encoding="utf-8"))
    next(n for n in bad.values() if n["class_type"] == "MoMALoadAdapter")["inputs"]["adapter_name"] = "gone.th"
    (folder / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
    ran = program(folder, server, "photo.png", "cup", "A cup.", "none.png", "--graph", "bad.json")
    assert ran.returncode == 1
    assert "adapter_name: there is no adapter 'gone.th'. Searched:" in ran.stderr
    assert "Found: moma_mini_adapter.safetensors. Download" in ran.stderr


class Forgetful(BaseHTTPRequestHandler):
    """A server that was restarted while the prompt ran."""

    busy = False

    def do_POST(self) -> None:
        self._answer({"name": "photo.png", "prompt_id": "a-prompt"})

    def do_GET(self) -> None:
        self._answer({"queue_running": ["a-prompt"] if self.busy else []} if self.path == "/queue" else {})

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _answer(self, content: dict[str, object]) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


class Dying(Forgetful):
    """A server that works on the prompt, and breaks every connection after it has been asked twice."""

    busy, asked = True, 0

    def do_GET(self) -> None:
        Dying.asked += 1
        if Dying.asked > 2:
            self.connection.shutdown(SHUT_RDWR)
        else:
            super().do_GET()


def ask(folder: Path, handler: type[Forgetful]) -> subprocess.CompletedProcess[str]:
    """Run the page's program against such a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "personalize.py", "photo.png", "cup", "A cup.", "none.png", "--server", address]
        ran = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
        server.shutdown()
    return ran


def test_waiting_ends_when_the_server_dies(folder: Path) -> None:
    ran = ask(folder, Dying)
    assert ran.returncode == 1 and re.match(r"http://127\.0\.0\.1:\d+ does not answer: ", ran.stderr), ran.stderr


def test_waiting_ends_when_the_server_has_forgotten_the_prompt(folder: Path) -> None:
    ran = ask(folder, Forgetful)
    assert ran.returncode == 1 and ran.stderr.startswith("The server no longer knows the prompt"), ran.stderr
