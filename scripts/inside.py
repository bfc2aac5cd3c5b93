"""For scripts that need ComfyUI: set up, then go on inside its Python."""

import os
import subprocess
import sys
from pathlib import Path

from comfyui_source import SetupError, add_workbench
from setup_env import environment

INSIDE = "COMFYUI_MOMA_INSIDE"


def comfyui_inside(script: str) -> Path:
    """The ComfyUI in whose Python this runs; outside of one, set up, run `script` in it and exit as it does."""
    add_workbench()
    if inside := os.environ.get(INSIDE):
        return Path(inside)
    try:
        found = environment()
    except SetupError as error:
        sys.exit(f"error: {error}")
    variables = {**found.variables(), INSIDE: str(found.comfyui)}
    sys.exit(subprocess.run([found.python, script, *sys.argv[1:]], env=variables, check=False).returncode)
