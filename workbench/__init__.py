"""A real ComfyUI, small models with random weights and a scene to run: for scripts, benchmarks, training and tests.

The repository's root comes last on the path: its `nodes` is not ComfyUI's, see `add_workbench` of the scripts.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EDITOR = "COMFYUI_MOMA_EDITOR"
"""Environment variable: a folder with the editor that a `ComfyServer` shows in place of ComfyUI's own."""
