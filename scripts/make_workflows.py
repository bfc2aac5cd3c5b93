"""Writes all workflows anew, also as API prompts, from `workflow_specs.py` and the live node definitions."""

import tempfile
from pathlib import Path

from comfyui_source import ROOT
from graph import Json, dump
from inside import comfyui_inside
from workflow_specs import PERSONALIZE, WORKFLOWS, new_context, personalize

BESIDE = ("MoMASubjectMask", "MoMASaveSubject")


def files(info: Json) -> dict[Path, str]:
    """What the repository should hold, by path, for the node definitions `info` of a server."""
    written: dict[Path, str] = {}
    for describe in WORKFLOWS:
        graph = describe()
        written[ROOT / "workflows" / f"{graph.name}.json"] = dump(graph.ui(info))
        written[ROOT / "tests" / "api" / f"{graph.name}.json"] = dump(graph.api(info))
    rows = for_rows(new_context().api(info))
    written[ROOT / "moma_batch" / "default.json"] = dump(rows)
    written[ROOT / "moma_batch" / "small_world.json"] = dump(in_small_world(rows))
    graph, inputs, outputs = personalize()
    written[ROOT / "subgraphs" / f"{PERSONALIZE.name}.json"] = dump(graph.blueprint(info, PERSONALIZE, inputs, outputs))
    written[ROOT / "tests" / "api" / "blueprint" / "personalize.json"] = dump(graph.api(info, prefix="1:"))
    return written


def for_rows(prompt: Json) -> Json:
    """A prompt for many rows: only the picture is kept of each."""
    return {name: node for name, node in prompt.items() if node["class_type"] not in BESIDE}


def in_small_world(prompt: Json) -> Json:
    """The same prompt with the weights of this pack, and the settings of the workflow *try_it*."""
    changes = {
        "CheckpointLoaderSimple": {"ckpt_name": "moma_mini.safetensors", "example": "striped cup"},
        "MoMALoadMLLM": {"model_name": "moma_mini_llava"},
        "MoMALoadAdapter": {"adapter_name": "moma_mini_adapter.safetensors"},
        "EmptyLatentImage": {"width": 128, "height": 128},
        "KSampler": {"steps": 20, "cfg": 4.0},
    }
    made = {}
    for name, node in prompt.items():
        made[name] = {**node, "inputs": {**node["inputs"], **changes.get(node["class_type"], {})}}
        if node["class_type"] == "CheckpointLoaderSimple":
            made[name] |= {"class_type": "MoMALoadMini", "_meta": {"title": "Load MoMA Mini Checkpoint"}}
    return made


def main() -> None:
    """Ask a server, write the files."""
    comfyui = comfyui_inside(__file__)
    from workbench.comfy_server import ComfyServer

    with tempfile.TemporaryDirectory(prefix="moma-workflows-") as folder, ComfyServer(comfyui, Path(folder)) as server:
        written = files(server.object_info())
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"Wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
