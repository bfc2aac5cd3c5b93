"""A ComfyUI of our own: started, watched, started anew."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .guard import end_group, end_left_over
from .server import GoneError, Server

GUARD = Path(__file__).with_name("guard.py")
START_SECONDS = 900.0
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Launch:
    """How to start one.

    Attributes:
        comfyui: Its folder.
        python: The Python that can run it.
        folder: Where its inputs, outputs, user files and log go.
        arguments: More for its command line.
    """

    comfyui: Path
    python: str
    folder: Path
    arguments: Sequence[str] = ()


class ComfyProcess:
    """One ComfyUI process on a free port of this machine, reached from this machine only."""

    def __init__(self, launch: Launch) -> None:
        """Describe it; `start` starts it."""
        self._launch, self._guard = launch, None
        self._pid_file = launch.folder / "pid"
        self.log = launch.folder / "comfyui.log"
        self.url = ""

    _guard: subprocess.Popen[bytes] | None

    def start(self, stopped: Callable[[], bool]) -> str:
        """Start it, in the place of one that runs, and wait until it answers; its address.

        Raises:
            GoneError: It ended, or did not answer in time; the message has the end of its log.
        """
        self.stop()
        launch = self._launch
        for name in ("input", "output", "temp", "user"):
            (launch.folder / name).mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [launch.python, str(launch.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--disable-auto-launch"]
        for name in ("input", "output", "temp", "user"):
            command += [f"--{name}-directory", str(launch.folder / name)]
        command += ["--database-url", f"sqlite:///{(launch.folder / 'comfyui.db').as_posix()}", *launch.arguments]
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, str(GUARD), str(self._pid_file), *command],
                cwd=launch.comfyui,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=os.name != "nt",  # Ctrl-C is for the driver
            )
        try:
            self._wait(stopped)
        except GoneError:
            self.stop()
            raise
        return self.url

    def is_running(self, seconds: float = 0.0) -> bool:
        """Whether the process is there, and still is after so many seconds. Without its guard it may not go on."""
        guard = self._guard
        if guard is None:
            return False
        try:
            guard.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def stop(self) -> None:
        """End it and all that it started."""
        guard, self._guard = self._guard, None
        if guard is not None:
            assert guard.stdin is not None
            guard.stdin.close()
            try:
                guard.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                end_group(guard.pid)
                guard.wait()
        end_left_over(self._pid_file)

    def memory(self) -> int:
        """Bytes of main memory that it holds; 0 where the system does not say."""
        try:
            pid = self._pid_file.read_text(encoding="utf-8").split()[0]
            pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError, AttributeError):
            return 0

    def log_end(self) -> str:
        """The last lines that it printed."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4000))
                return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-15:])
        except OSError:
            return ""

    def _wait(self, stopped: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        server = Server(self.url, 5)
        while time.monotonic() < deadline and not stopped():
            if not self.is_running():
                raise GoneError(f"ComfyUI ended while it started:\n{self.log_end()}")
            try:
                server.versions()
                return
            except GoneError:
                time.sleep(0.1)
        if stopped():
            raise GoneError("stopped")
        raise GoneError(f"ComfyUI did not answer within {START_SECONDS:.0f} s:\n{self.log_end()}")
