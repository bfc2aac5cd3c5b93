"""Where Chromium is."""

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium_path() -> str | None:
    """`CHROMIUM`, or the browser that is installed. Ubuntu's `chromium-browser` is none where there is no snap."""
    return os.environ.get("CHROMIUM") or next(filter(_runs, filter(None, map(shutil.which, NAMES))), None)


def _runs(path: str) -> bool:
    try:
        return subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
