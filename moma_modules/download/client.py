"""Starts the process that downloads, follows it and ends it.

It is a process because Cancel must end a connection that has stalled at once, and free the file for the next try: a
thread that waits for the network can neither be ended nor made to let go. No other code of the pack starts one.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from ..host.disk import Report
from .release import ADDRESS, REPOSITORY

WORKER = Path(__file__).with_name("worker.py")
POLL_SECONDS = 0.1
CREATE_NO_WINDOW = 0x08000000
"""Of the Windows API; Python has the name `subprocess.CREATE_NO_WINDOW` on Windows only."""


def fetch(folder: Path, names: list[str], report: Report) -> None:
    """Fetch the files of the release that `folder` lacks; without any request if it lacks none.

    huggingface_hub's environment variables hold (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and others).

    Args:
        report: Called several times a second; may raise, which ends the download at once. What has arrived is kept,
            and the next call goes on from there.

    Raises:
        RuntimeError: It could not be done; the message says why and what to do.
    """
    if all((folder / name).is_file() for name in names):
        return
    job = json.dumps({"repository": REPOSITORY, "folder": str(folder), "files": names})
    options = start_options(sys.platform)
    process = subprocess.Popen(worker_command(job), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    assert process.stdout is not None
    try:
        _follow(process.stdout, folder, report)
    finally:
        process.kill()
        process.communicate()


def worker_command(job: str) -> list[str]:
    """The command line of the process: ComfyUI's Python with its choice of packages, no shell, the job as JSON."""
    return [sys.executable, *(["-s"] if sys.flags.no_user_site else []), str(WORKER), job]


def start_options(platform: str) -> dict[str, Any]:
    """How `subprocess.Popen` is to start the process.

    It gets no console: on Windows one would open, and closing it would end the download. Nor does it share ComfyUI's,
    where Ctrl+C would reach both; it ends with ComfyUI because its standard input does.

    Args:
        platform: `sys.platform`.
    """
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    alone = {"creationflags": CREATE_NO_WINDOW} if platform == "win32" else {"start_new_session": True}
    return {"env": environment, **alone}


def _follow(output: IO[bytes], folder: Path, report: Report) -> None:
    """Pass on what the process tells, until it has ended."""
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(output, lines), daemon=True).start()
    state: tuple[int, int, str] = (0, 1, "Asking the hub")
    while True:
        report(*state)
        try:
            line = lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        gone = {"error": "The process that downloads ended; ComfyUI's log says more."}
        event: dict[str, Any] = json.loads(line) if line else gone
        if "error" in event:
            raise RuntimeError(
                f"download: {event['error']} Queue again to go on, or get the files by hand: {ADDRESS} into {folder}."
            )
        if "finished" in event:
            return
        state = (event["done"], event["total"], event["text"])


def _read(output: IO[bytes], lines: queue.Queue[bytes]) -> None:
    for line in output:
        lines.put(line)
    lines.put(b"")
