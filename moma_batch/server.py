"""A client of one ComfyUI server. Its history is the truth; the web socket is not used."""

import http.client
import json
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import urlencode, urlsplit

from .jobs import Graph

SECONDS = 60.0
"""How long one request may take: a server that loads a model answers late."""
LARGEST = 1 << 30
KEPT_SECONDS = 2.0
"""A connection that was idle for longer is not used again: the server, or what lies between, may have closed it."""


class GoneError(Exception):
    """The server cannot be reached, is silent, or answers what ComfyUI does not."""


class RefusedError(Exception):
    """The server does not take a prompt; the message is what the user of the editor would see."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        """Put the server's words together."""
        error = answer.get("error") or {}
        parts = [str(error.get("message", answer) if isinstance(error, dict) else error)]
        self.node = ""
        for name, node in (answer.get("node_errors") or {}).items():
            self.node = self.node or str(node.get("class_type", name))
            for one in node.get("errors", []):
                parts.append(f"{node.get('class_type')} ({name}): {one.get('message')}: {one.get('details')}")
        super().__init__("\n".join(parts))


class Server:
    """One server by its address; several threads may ask it at a time. Redirects are not followed, proxies not used."""

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        """Raises ValueError unless it is an address such as http://127.0.0.1:8188."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"--server {url!r} is no address such as http://127.0.0.1:8188")
        self.url, self._seconds = url.rstrip("/"), seconds
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._place, self._path = (parts.hostname, parts.port), parts.path.rstrip("/")
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()

    def versions(self) -> dict[str, str]:
        """What the server says it is."""
        system = self._json("GET", "/system_stats").get("system", {})
        names = {"comfyui_version": "comfyui", "python_version": "python", "pytorch_version": "torch"}
        return {short: str(system[name]).split(" ")[0] for name, short in names.items() if name in system}

    def node_classes(self) -> set[str]:
        """The classes of nodes that it knows."""
        return set(self._json("GET", "/object_info"))

    def choices(self, node: str, key: str) -> list[str]:
        """What it offers for an input of a node; empty where it does not say."""
        found = self._json("GET", f"/object_info/{node}").get(node, {}).get("input", {}).get("required", {}).get(key)
        kind = found[0] if found else []
        options = kind if isinstance(kind, list) else found[1].get("options", []) if len(found) > 1 else []
        return [str(option) for option in options]

    def upload(self, name: str, content: bytes) -> None:
        """Put a file into its input folder, over one of that name."""
        folder, _, file = name.rpartition("/")
        mark = uuid.uuid4().hex
        fields = {"subfolder": folder, "type": "input", "overwrite": "true"}
        head = "".join(
            f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head += f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{file}"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
        answer = self._json("POST", "/upload/image", body, f"multipart/form-data; boundary={mark}")
        if answer.get("name") != file or str(answer.get("subfolder", "")).replace("\\", "/") != folder:
            raise GoneError(f"{self.url} put {name} elsewhere: {answer}")

    def queue(self, graph: Graph, prompt_id: str, mark: dict[str, Any]) -> None:
        """Queue a prompt under an id of our own; `mark` goes into the pictures.

        Raises:
            RefusedError: The server finds it invalid, in part or as a whole.
        """
        content = {"prompt": graph, "prompt_id": prompt_id, "extra_data": {"extra_pnginfo": {"moma_batch": mark}}}
        answer = self._json("POST", "/prompt", json.dumps(content).encode(), "application/json")
        if answer.get("node_errors"):
            self.cancel(prompt_id)
            raise RefusedError(answer)
        if answer.get("prompt_id") != prompt_id:
            raise GoneError(f"{self.url} gave the prompt another id than asked for: {answer.get('prompt_id')!r}")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What became of a prompt; None while it waits or runs, or if it is unknown."""
        found = self._json("GET", f"/history/{prompt_id}").get(prompt_id)
        return dict(found) if found else None

    def is_queued(self, prompt_id: str) -> bool:
        """Whether a prompt waits or runs."""
        queue = self._json("GET", "/queue")
        return any(item[1] == prompt_id for kind in ("queue_running", "queue_pending") for item in queue.get(kind, []))

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt from the queue, and stop it if it runs."""
        self._request("POST", "/queue", json.dumps({"delete": [prompt_id]}).encode(), "application/json")
        self._request("POST", "/interrupt", json.dumps({"prompt_id": prompt_id}).encode(), "application/json")

    def forget(self, prompt_id: str) -> None:
        """Take a prompt out of the history, which lies in the server's memory."""
        self._request("POST", "/history", json.dumps({"delete": [prompt_id]}).encode(), "application/json")

    def output(self, file: Mapping[str, str]) -> bytes:
        """The content of a file that a prompt made."""
        wanted = {name: file[name] for name in ("filename", "subfolder", "type")}
        return self._request("GET", "/view?" + urlencode(wanted))

    def _json(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Any]:
        text = self._request(method, path, body, kind)
        try:
            found = json.loads(text)
        except ValueError as error:
            raise GoneError(f"{self.url}{path} did not answer with JSON: {text[:80]!r}") from error
        if not isinstance(found, dict):
            raise GoneError(f"{self.url}{path} did not answer as ComfyUI does: {text[:80]!r}")
        return found

    def _request(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        kept = self._kept()
        try:
            try:
                status, wanted, content = self._exchange(kept or self._connection(), method, path, body, kind)
            except (OSError, http.client.HTTPException):
                if kept is None or method != "GET":  # what changes something is never sent twice
                    raise
                status, wanted, content = self._exchange(self._connection(), method, path, body, kind)
        except (OSError, http.client.HTTPException) as error:
            raise GoneError(f"{self.url} cannot be reached: {error or type(error).__name__}") from error
        if not 200 <= status < 300:
            self._refused(path, status, content)
        if len(content) > LARGEST or (wanted is not None and int(wanted) != len(content)):
            raise GoneError(f"{self.url}{path} gave {len(content)} bytes of {wanted}")
        return content

    def _connection(self) -> http.client.HTTPConnection:
        return self._kind(*self._place, timeout=self._seconds)

    def _kept(self) -> http.client.HTTPConnection | None:
        """A connection that was just in use, which spares both sides a new one."""
        while self._idle:
            try:
                connection, since = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if time.monotonic() - since < KEPT_SECONDS:
                return connection
            connection.close()
        return None

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, kind: str
    ) -> tuple[int, str | None, bytes]:
        """Status, length as announced, and content of an answer."""
        try:
            headers = {"Content-Type": kind} if body is not None else {}
            connection.request(method, self._path + path, body, headers)
            answer = connection.getresponse()
            content = answer.read(LARGEST + 1)
        except BaseException:
            connection.close()
            raise
        if answer.isclosed() and not answer.will_close:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()
        return answer.status, answer.headers.get("Content-Length"), content

    def _refused(self, path: str, status: int, text: bytes) -> NoReturn:
        """Raise what an answer of another status means."""
        if path == "/prompt" and status == 400:
            try:
                answer = json.loads(text)
            except ValueError:
                answer = {"error": text.decode("utf-8", "replace")[:300]}
            raise RefusedError(answer)
        raise GoneError(f"{self.url}{path} answered {status}: {text[:200].decode('utf-8', 'replace')}")
