"""A run of `moma_batch` as a user starts it, on stand-ins for ComfyUI that can fail."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from workbench import ROOT

FAKE = Path(__file__).parent / "fake_comfyui"
COLUMNS = ("id", "image", "subject", "prompt", "seed")
SECONDS = 1800

sys.path.append(str(ROOT))


class Place:
    """A folder with a table, photographs, and the folder `out` of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "executed.jsonl"
        self.variables = {**os.environ, "FAKE_LOG": str(self.log), "FAKE_MARKS": str(folder)}
        self.python = sys.executable
        self.servers: list[subprocess.Popen[bytes]] = []
        photo = (ROOT / "workbench" / "photo" / "photo.jpg").read_bytes()
        for name in ("photo.jpg", "other.jpg"):
            (folder / name).write_bytes(photo + name.encode() + b"\xff\xd9")

    def table(self, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> Path:
        path = self.folder / "table.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        return path

    def command(self, *words: str, own: int = 0) -> list[str]:
        parts = [self.python, str(ROOT / "moma_batch"), *words, "--out", str(self.out)]
        return parts + (["--comfyui", str(FAKE), "--python", sys.executable, "--workers", str(own)] if own else [])

    def start(self, *words: str, own: int = 0) -> "subprocess.Popen[str]":
        command = self.command(*words, own=own)
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )

    def do(self, *words: str, own: int = 0) -> tuple[int, str]:
        """Exit status and what was printed."""
        process = self.start(*words, own=own)
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"it did not end within {SECONDS} s:\n{process.communicate()[0]}")
        return process.returncode, output

    def server(self, port: int = 0) -> tuple[str, "subprocess.Popen[bytes]"]:
        """A stand-in that runs by itself: its address and process."""
        folder = self.folder / "server"
        command = [sys.executable, str(FAKE / "main.py"), "--port", str(port)]
        command += ["--input-directory", str(folder / "input"), "--output-directory", str(folder / "output")]
        process = subprocess.Popen(command, env=self.variables, stdout=subprocess.PIPE)
        self.servers.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}", process

    def results(self) -> list[dict[str, str]]:
        with (self.out / "results.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def journal(self) -> list[dict[str, Any]]:
        lines = (self.out / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def executed(self) -> list[str]:
        """The rows whose prompts servers began to run."""
        if not self.log.is_file():
            return []
        return [str(json.loads(line)["id"]) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def running(self) -> list[int]:
        """The servers of our own that run, by their process ids."""
        found = []
        for file in self.out.glob("workers/*/pid"):
            with contextlib.suppress(OSError, IndexError):  # its guard removes it, or has only begun to write it
                pid = int(file.read_text(encoding="utf-8").split()[0])
                if alive(pid):
                    found.append(pid)
        return found

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def pictures(self) -> dict[str, str]:
        """The key that is painted into each picture, by the picture's name."""
        from zlib import decompress

        from moma_batch.pictures import chunks

        found = {}
        for path in (self.out / "images").rglob("*.png"):
            (data,) = [data for kind, data in chunks(path.read_bytes()) if kind == b"IDAT"]
            lines = decompress(data)
            found[path.relative_to(self.out).as_posix()] = (lines[1:25] + lines[26:50])[:32].hex()
        return found


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for server in made.servers:
        server.kill()
        server.wait()
    for pid in made.running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
