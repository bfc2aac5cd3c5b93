"""A server on the loopback that speaks the Hugging Face hub's download protocol, with faults to order."""

import hashlib
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

COMMIT = "c0ffee" + "0" * 34
CHUNK = 1 << 18


@dataclass
class HubFile:
    """A file of the repository.

    Attributes:
        content: What is sent.
        stated: What its size and checksum are stated for, if that is something else.
        large: Whether it is in the large file storage: redirected to, and with a SHA-256.
        breaks: How many of the next transfers break off halfway.
        held_at: From this byte on a transfer waits until it is None; tests that need one under way set it, so that
            none depends on how fast anything is.
        status: Answered instead, if not 200.
    """

    content: bytes
    stated: bytes | None = None
    large: bool = True
    breaks: int = 0
    held_at: int | None = None
    status: int = 200

    @property
    def etag(self) -> str:
        """The checksum that is stated."""
        stated = self.content if self.stated is None else self.stated
        if self.large:
            return hashlib.sha256(stated).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(stated) + stated).hexdigest()


@dataclass
class Request:
    """What was asked for."""

    method: str
    path: str
    first_byte: int
    token: str | None


@dataclass
class HubServer:
    """Serves one repository; a context manager.

    Attributes:
        token: Without it, everything is refused; None for a public repository.
        requests: All requests in order.
    """

    repository: str
    files: dict[str, HubFile]
    token: str | None = None
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "HubServer":
        """Start."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """Content comes from `localhost` at this port: another host, as with the real hub."""
        return int(self._server.server_port)

    def sent(self, name: str) -> list[int]:
        """From which byte on a file's content was asked for, each time."""
        return [r.first_byte for r in self.requests if r.method == "GET" and r.path.endswith(name)]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Be quiet."""

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, with_content: bool) -> None:
            match = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(match[1]) if match else 0
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            name = self.path.rsplit("/", 1)[1]
            on_store = self.path.startswith("/store/")
            hub.requests.append(Request(self.command, self.path, start, token))
            if hub.token is not None and token != hub.token and not on_store:
                return self._refuse(401, "", "Invalid credentials in Authorization header")
            if name not in hub.files or (hub.repository not in self.path and not on_store):
                return self._refuse(404, "EntryNotFound", "Entry not found")
            file = hub.files[name]
            if file.status != 200:
                return self._refuse(file.status, "", "Something is wrong")
            stated = file.content if file.stated is None else file.stated
            headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if file.large and not on_store:
                headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(stated))}
                headers |= {"Location": f"http://localhost:{hub.port}/store/{name}", "Content-Length": "0"}
                return self._head(302, headers)
            content = file.content[start:]
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(file.content) - 1}/{len(file.content)}"
            self._head(206 if start else 200, headers | {"Content-Length": str(len(content))})
            if with_content:
                self._send(file, content)

        def _send(self, file: HubFile, content: bytes) -> None:
            end = len(content)
            if file.breaks:
                file.breaks -= 1
                end //= 2
            self.close_connection = end < len(content)
            for i in range(0, end, CHUNK):
                while file.held_at is not None and i >= file.held_at:
                    time.sleep(0.01)
                try:
                    self.wfile.write(content[i : min(i + CHUNK, end)])
                except OSError:  # the client has gone
                    self.close_connection = True
                    return

        def _refuse(self, status: int, code: str, message: str) -> None:
            self._head(status, {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"})

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler
