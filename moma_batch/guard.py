"""Owns one ComfyUI process: whatever ends the driver, a crash too, ends the process and all that it started.

Run as a script, by `process.py`: `guard.py PID_FILE COMMAND ...`. Standard input is a pipe from the driver; when it
closes, the driver wants the process ended, or is dead.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

WINDOWS = os.name == "nt"


def end_group(pid: int) -> None:
    """End a process that leads a group, and all of the group."""
    if WINDOWS:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def started_at(pid: int) -> str:
    """When a process began, so that another one of the same number is not taken for it; "" if nobody knows."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def end_left_over(pid_file: Path) -> bool:
    """End the process that an earlier guard left behind; whether there was one."""
    try:
        pid, since = pid_file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return False
    there = since != "0" and started_at(int(pid)) == since
    if there:
        end_group(int(pid))
    pid_file.unlink(missing_ok=True)
    return there


def main() -> None:
    """Start the command and wait for its end, or for that of standard input."""
    pid_file, command = Path(sys.argv[1]), sys.argv[2:]
    if not WINDOWS:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the driver decides
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=not WINDOWS)
    own = f"{process.pid} {started_at(process.pid) or 0}"
    pid_file.write_text(own, encoding="utf-8")
    threading.Thread(target=_watch, args=(process.pid,), daemon=True).start()
    status = process.wait()
    end_group(process.pid)  # what it started
    with contextlib.suppress(OSError):  # a later guard may have put its own there
        if pid_file.read_text(encoding="utf-8") == own:
            pid_file.unlink()
    os._exit(status & 0xFF)


def _watch(pid: int) -> None:
    sys.stdin.buffer.read()
    end_group(pid)


if __name__ == "__main__":
    main()
