"""What each picture of the documentation was made of, to notice when it no longer shows what is there.

`screenshots.py` notes a digest for every picture it writes; a test compares.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from comfyui_source import ROOT

NOTED = ROOT / "docs" / "images" / "shown.json"
PREVIEWS = {
    "preview_extract": "MoMAExtractSubject",
    "preview_tokens": "MoMATextEncode",
    "preview_mask": "MoMASubjectMask",
    "preview_live": "MoMAApplyAdapter",
}
"""Pictures of one node after a run."""
THUMBNAILS = {
    "new_context": "New context",
    "simple": "One subject, one prompt",
    "new_texture": "New texture",
    "two_subjects": "Two subjects, each with its region",
    "hires_fix": "A second pass at 1.5 times the size",
    "prompts": "Several prompts in one run",
    "from_subject": "From a saved subject, without the language model",
    "strength_study": "Strength study",
    "auto_mask": "Automatic mask: BiRefNet is off until you turn it on",
    "pose": "Pose: the ControlNet is off until you turn it on",
    "style_lora": "Style: the LoRA is off until you turn it on",
    "try_it": "Try it: nothing to download",
}
"""The template browser's pictures, of runs, and what is written over them."""
TRAINED = "weights/trained.json"
"""What says that the small world's weights are others."""
HELP_PAGE = "web/docs/MoMASelfAttnShortcut.md"


def sources(root: Path = ROOT) -> dict[str, str]:
    """Every picture that is made, by its path in the repository, and a digest of what it is made of."""
    drawn = {path.stem: _graph(path) for path in (root / "workflows").glob("*.json")}
    texts = {f"docs/images/{name}.png": [graph] for name, graph in drawn.items()}
    texts["docs/images/strength_study_result.png"] = [drawn["strength_study"]]
    texts["docs/images/help_page.png"] = [drawn["new_context"], (root / HELP_PAGE).read_text("utf-8")]
    (blueprint,) = (root / "subgraphs").glob("*.json")
    texts["docs/images/blueprint.png"] = [_graph(blueprint)]
    for drawing in (root / "scripts" / "artwork").glob("*.svg"):
        texts[f"docs/images/{drawing.stem}.png"] = [drawing.read_text("utf-8")]
    nodes = json.loads((root / "tests" / "data" / "object_info.json").read_text("utf-8"))
    single = {name: json.dumps(node, sort_keys=True) for name, node in nodes.items()}
    texts |= {f"web/docs/images/{name}.png": [node] for name, node in single.items()}
    texts |= {f"docs/images/{name}.png": [single[kind]] for name, kind in PREVIEWS.items()}
    trained = (root / TRAINED).read_text("utf-8")
    for name, title in THUMBNAILS.items():
        queued = _queued(root / "tests" / "api" / f"{name}.json")
        texts[f"workflows/{name}.jpg"] = [title, queued, trained]
    return {name: _digest(parts) for name, parts in sorted(texts.items())}


def noted() -> dict[str, str]:
    """The digests of when the pictures were made."""
    return dict(json.loads(NOTED.read_text("utf-8"))) if NOTED.is_file() else {}


def note(picture: Path) -> None:
    """Note that a picture was made just now; one that has no source here is left out."""
    name = picture.relative_to(ROOT).as_posix()
    if digest := sources().get(name):
        known = dict(sorted({**noted(), name: digest}.items()))
        NOTED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _graph(path: Path) -> str:
    """What of a workflow is seen in its picture: not its metadata."""
    workflow = json.loads(path.read_text("utf-8"))
    nodes = [{key: value for key, value in node.items() if key != "properties"} for node in workflow["nodes"]]
    return json.dumps([nodes, workflow["links"], workflow.get("groups")], sort_keys=True)


def _queued(path: Path) -> str:
    """What of a prompt makes its pictures: not the titles of its nodes."""
    prompt = json.loads(path.read_text("utf-8"))
    return json.dumps({name: [node["class_type"], node["inputs"]] for name, node in prompt.items()}, sort_keys=True)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
