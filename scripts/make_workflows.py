"""Writes all workflows anew, also as API prompts, from `workflow_specs.py` and the live node definitions."""

import tempfile
from pathlib import Path

from comfyui_source import ROOT
from graph import RUNS, Json, dump
from inside import comfyui_inside
from workflow_specs import PERSONALIZE, WORKFLOWS, for_photographs, new_context, personalize

API = ROOT / "tests" / "api"
BESIDE = ("MoMASubjectMask", "MoMASaveSubject")


def files(info: Json) -> dict[Path, str]:
    """What the repository should hold, by path, for the node definitions `info` of a server."""
    from workbench.small_world import in_small_world

    written: dict[Path, str] = {}
    for describe in WORKFLOWS:
        graph = describe()
        written[ROOT / "workflows" / f"{graph.name}.json"] = dump(graph.ui(info))
        written[API / f"{graph.name}.json"] = dump(graph.api(info))
        if any(node.mode != RUNS for node in graph.nodes):
            prompt = for_photographs(graph.api(info, turned_on=True))
            written[API / "photographs" / f"{graph.name}.json"] = dump(prompt)
    rows = for_rows(for_photographs(new_context().api(info, turned_on=True)))
    written[ROOT / "moma_batch" / "default.json"] = dump(rows)
    written[ROOT / "moma_batch" / "small_world.json"] = dump(in_small_world(rows))
    graph, inputs, outputs = personalize()
    written[ROOT / "subgraphs" / f"{PERSONALIZE.name}.json"] = dump(graph.blueprint(info, PERSONALIZE, inputs, outputs))
    written[API / "blueprint" / "personalize.json"] = dump(graph.api(info, prefix="1:"))
    return written


def for_rows(prompt: Json) -> Json:
    """A prompt for many rows: only the picture is kept of each."""
    return {name: node for name, node in prompt.items() if node["class_type"] not in BESIDE}


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
