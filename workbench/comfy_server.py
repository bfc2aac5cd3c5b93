"""A real ComfyUI server with the pack in it, and what a client does with one.

Needs websocket-client, and a Python that ComfyUI can run in.
"""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket

from . import EDITOR, ROOT

PACK_NAME = "ComfyUI-MoMA"
START_SECONDS = 900
RUN_SECONDS = 3600
HISTORY_SECONDS = 900

Prompt = dict[str, dict[str, Any]]
Event = dict[str, Any]


class ServerError(Exception):
    """The server did not start, or refused something; the message holds what it said."""


class PromptRefusedError(ServerError):
    """The server did not accept a prompt. `node_errors` is what it said of each node."""

    def __init__(self, answer: dict[str, Any]) -> None:
        """Keep the server's answer and put its words together."""
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        parts = [str(answer.get("error", {}).get("message", answer))]
        for name, node in self.node_errors.items():
            for error in node["errors"]:
                parts.append(f"{name} ({node['class_type']}): {error['message']}: {error['details']}")
        super().__init__("\n".join(parts))


class ExecutionFailedError(ServerError):
    """A node raised an exception; the message is the one the user sees. `node_type` is the node's."""

    def __init__(self, event: Event) -> None:
        """Keep what the event says."""
        self.node_type = str(event["node_type"])
        super().__init__(f"{self.node_type}: {event['exception_message']}")


@dataclass
class Run:
    """What became of a prompt.

    Attributes:
        executed: Nodes that ran, in order.
        cached: Nodes whose earlier result was used.
        progress: (node, value, max) in order.
        outputs: Per output node, what it shows.
        previews: (node, JPEG or PNG bytes) that nodes showed on the way.
        texts: (node, text) that nodes showed on the way.
        interrupted: Whether it was stopped.
    """

    prompt_id: str
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[tuple[str, float, float]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    previews: list[tuple[str, bytes]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    def files(self, node: str, kind: str = "images") -> list[dict[str, str]]:
        """The files that an output node shows."""
        return list(self.outputs[node][kind])


class ComfyServer:
    """A running ComfyUI, as a context manager. Its files lie in `base`, none in the ComfyUI's own folder."""

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        models: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = ("--cpu",),
        pack: Path | None = ROOT,
        python: str = sys.executable,
    ) -> None:
        """Describe a server; entering the context starts it.

        Args:
            base: A folder for its input, output, models and custom_nodes.
            models: Files and folders to put below `base/models`, by relative name.
            arguments: For ComfyUI's command line.
            pack: The custom node pack to load; None for none.
        """
        self.base, self.input, self.output = base, base / "input", base / "output"
        self.log_file = base / "server.log"
        self._comfyui, self._python, self._arguments, self._pack = comfyui, python, list(arguments), pack
        self._client, self._port = uuid.uuid4().hex, 0
        self._process: subprocess.Popen[bytes] | None = None
        for folder in ("models", "custom_nodes", "input", "output", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if pack is not None:
            link(pack, base / "custom_nodes" / PACK_NAME)
        for name, path in (models or {}).items():
            self.add_model(name, path)

    def __enter__(self) -> "ComfyServer":
        """Start it and wait until it answers."""
        try:
            self._start()
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop it."""
        self.stop()

    def add_model(self, name: str, path: Path) -> None:
        """Put a file or folder below the models folder, under a relative name."""
        link(path, self.base / "models" / name)

    def add_input(self, path: Path) -> None:
        """Put a picture into the input folder."""
        shutil.copyfile(path, self.input / path.name)

    def log(self) -> str:
        """All that the server has printed."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def process_id(self) -> int:
        """The running server's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> str:
        """Where its pages are."""
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> bytes:
        """The body of a GET request."""
        with urllib.request.urlopen(f"{self.address}{path}", timeout=START_SECONDS) as answer:
            return bytes(answer.read())

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a POST request ({} for an empty one)."""
        url = f"{self.address}{path}"
        body = json.dumps(content).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            text = answer.read()
        return dict(json.loads(text)) if text else {}

    def object_info(self) -> dict[str, Any]:
        """All node definitions."""
        return dict(json.loads(self.get("/object_info")))

    def view(self, file: Mapping[str, str]) -> bytes:
        """The content of an output, as `Run.files` names it."""
        return self.get("/view?" + urllib.parse.urlencode(file))

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt; its id.

        Raises:
            PromptRefusedError: The server finds it invalid.
        """
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self._client})
        except urllib.error.HTTPError as error:
            raise PromptRefusedError(json.loads(error.read())) from error
        if answer.get("node_errors"):  # Some output of the graph is invalid, and would silently not be made.
            raise PromptRefusedError(answer)
        return str(answer["prompt_id"])

    def interrupt(self) -> None:
        """Stop the prompt that is running."""
        self.post("/interrupt", {})

    def run(self, prompt: Prompt, on_event: Callable[[Event], None] = lambda event: None) -> Run:
        """Queue a prompt and wait for its end.

        Args:
            on_event: Gets every event of this prompt, {"type", "data"}.

        Raises:
            PromptRefusedError: The server finds it invalid.
            ExecutionFailedError: A node raised an exception.
        """
        url = f"ws://127.0.0.1:{self._port}/ws?clientId={self._client}"
        connection = websocket.create_connection(url, timeout=RUN_SECONDS)
        try:
            run = Run(self.queue(prompt))
            while not self._ended(run, self._next_event(connection, run, on_event)):
                pass
        finally:
            connection.close()
        run.outputs = self._history(run.prompt_id)["outputs"]
        return run

    def stop(self) -> None:
        """End the process and those it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [self._python, str(self._comfyui / "main.py"), "--base-directory", str(self.base)]
        command += ["--listen", "127.0.0.1", "--port", str(self._port), "--disable-auto-launch", "--disable-api-nodes"]
        # Not in memory: there every thread of ComfyUI's has a database of its own, and all but one lack the tables.
        command += ["--database-url", f"sqlite:///{(self.base / 'comfyui.db').as_posix()}"]
        if editor := os.environ.get(EDITOR):
            command += ["--front-end-root", editor]
        command += self._arguments  # after it: a test that names an editor gets that one
        with self.log_file.open("wb") as log:
            # Its own process group, so that it can be ended with all that it started.
            self._process = subprocess.Popen(
                command,
                cwd=self._comfyui,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=os.name != "nt",
            )

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended with status {self._process.returncode}:\n{self._log_end()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join(self.log().splitlines()[-30:])

    def _history(self, prompt_id: str) -> dict[str, Any]:
        """What the server keeps of a prompt; it may write that down only after it has announced the end."""
        deadline = time.monotonic() + HISTORY_SECONDS
        while time.monotonic() < deadline:
            if found := json.loads(self.get(f"/history/{prompt_id}")).get(prompt_id):
                return dict(found)
            time.sleep(0.1)
        raise ServerError(f"ComfyUI has no history of prompt {prompt_id}:\n{self._log_end()}")

    def _next_event(self, connection: Any, run: Run, on_event: Callable[[Event], None]) -> Event:
        """The next event of this run; those of other prompts are skipped, previews and texts noted."""
        while True:
            try:
                message = connection.recv()
            except (OSError, websocket.WebSocketException) as error:
                raise ServerError(f"ComfyUI is gone or silent ({error}):\n{self._log_end()}") from error
            if isinstance(message, bytes):
                _note_binary(run, message)
            elif message:
                event = json.loads(message)
                if event.get("data", {}).get("prompt_id") == run.prompt_id:
                    on_event(event)
                    return dict(event)

    @staticmethod
    def _ended(run: Run, event: Event) -> bool:
        """Note what the event says; whether it is the last one."""
        kind, data = event["type"], event["data"]
        if kind == "executing" and data["node"] is not None:
            run.executed.append(data["node"])
        elif kind == "execution_cached":
            run.cached += data["nodes"]
        elif kind == "progress":
            run.progress.append((data["node"], data["value"], data["max"]))
        elif kind == "execution_error":
            raise ExecutionFailedError(data)
        elif kind == "execution_interrupted":
            run.interrupted = True
        return kind in ("execution_success", "execution_interrupted")


def _note_binary(run: Run, message: bytes) -> None:
    """Note what a node shows: 3 is text after the node's id, 4 a picture after its description."""
    kind, length = struct.unpack(">II", message[:8])
    head, body = message[8 : 8 + length], message[8 + length :]
    if kind == 3:
        run.texts.append((head.decode(), body.decode()))
    elif kind == 4:
        run.previews.append((json.loads(head)["node_id"], body))


def link(source: Path, target: Path) -> None:
    """A link to a file or folder, or a copy where links are not allowed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        else:
            shutil.copyfile(source, target)
