"""Makes the subject that comes with the pack anew, `weights/subjects`: of the small world's weights and first example.

After these weights changed: a subject goes with the adapter that made it, and a test looks for it.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from comfyui_source import ROOT
from inside import comfyui_inside

SUBJECT = ROOT / "weights" / "subjects" / "striped_cup.safetensors"
SAVES = "MoMASaveSubject"


def saving(prompt: dict[str, Any]) -> dict[str, Any]:
    """Of a prompt what its Save MoMA Subject needs."""
    (name,) = [name for name, node in prompt.items() if node["class_type"] == SAVES]
    wanted: list[str] = [name]
    found: dict[str, Any] = {}
    while wanted:
        name = wanted.pop()
        found[name] = prompt[name]
        wanted += [value[0] for value in prompt[name]["inputs"].values() if isinstance(value, list)]
    return found


def main() -> None:
    """Extract it on a server and keep the file."""
    comfyui = comfyui_inside(__file__)
    from workbench.comfy_server import ComfyServer

    prompt = saving(json.loads((ROOT / "tests" / "api" / "new_context.json").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="moma-subject-") as folder, ComfyServer(comfyui, Path(folder)) as server:
        server.run(prompt)
        (made,) = (server.output / "moma_subjects").glob("*.safetensors")
        SUBJECT.parent.mkdir(exist_ok=True)
        shutil.copyfile(made, SUBJECT)
    print(f"Wrote {SUBJECT.relative_to(ROOT)}, {SUBJECT.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
