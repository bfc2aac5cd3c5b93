"""Workflows brought into the small world: the same graphs with the weights that come with the pack.

For tests and pictures. What names a file, a size or a number of steps is changed; what is wired is not.
"""

import copy
from typing import Any

CHECKPOINT, MLLM, ADAPTER = "moma_mini.safetensors", "moma_mini_llava", "moma_mini_adapter.safetensors"
EXAMPLE = "striped cup"
SIDE, STEPS, CFG = 128, 20, 4.0

PROMPTS = {
    "A cup on a beach at sunset.": "A cup on a beach.",
    "A cup on a desk in a library.": "A cup in a city at night.",
    "A wooden sculpture of a cup on the table.": "A cup made of wood on a beach.",
    "A watercolour painting of a cup on a table.": "A cup in a meadow.",
    "A cup on a wooden table.": "A cup in the desert.",
    "A vase on a wooden table.": "A vase in the desert.",
}
"""What the workflows ask for, and something like it that the small world knows."""

_FILES = {
    "MoMALoad": {"model_name": MLLM, "adapter_name": ADAPTER},
    "MoMALoadMLLM": {"model_name": MLLM},
    "MoMALoadAdapter": {"adapter_name": ADAPTER},
}

_TALLER = 70
"""Pixels by which Load MoMA Mini Checkpoint is taller than Load Checkpoint."""


def in_small_world(prompt: dict[str, Any], steps: int = STEPS, photo: bool = False) -> dict[str, Any]:
    """An API prompt; its pictures are the example that Load MoMA Mini Checkpoint gives, or still from Load Image."""
    changed = copy.deepcopy(prompt)
    mini = next((name for name, node in changed.items() if node["class_type"] == "CheckpointLoaderSimple"), None)
    if mini is not None:
        changed[mini] |= {
            "class_type": "MoMALoadMini",
            "inputs": {"ckpt_name": CHECKPOINT, "example": EXAMPLE},
            "_meta": {"title": "Load MoMA Mini Checkpoint"},
        }
    photos = [name for name, node in changed.items() if node["class_type"] == "LoadImage" and not photo]
    for node in changed.values():
        inputs = node["inputs"]
        inputs |= _FILES.get(node["class_type"], {})
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in photos:
                inputs[name] = [mini, 3 + value[1]]
            elif isinstance(value, str):
                inputs[name] = PROMPTS.get(value, value)
        if "steps" in inputs:
            inputs |= {"steps": min(steps, inputs["steps"]), "cfg": CFG}
        if node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": SIDE * inputs["width"] // 512, "height": SIDE * inputs["height"] // 512}
    return {name: node for name, node in changed.items() if name not in photos}


def shown_in_small_world(workflow: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """A workflow as the editor saves it; Load Image stays, for an example in ComfyUI's input folder."""
    changed = copy.deepcopy(workflow)
    for node in changed["nodes"]:
        values = node.get("widgets_values", [])
        if node["type"] == "CheckpointLoaderSimple":
            node["type"], values = "MoMALoadMini", [CHECKPOINT, EXAMPLE]
            node["properties"] = {"Node name for S&R": "MoMALoadMini"}
            extra = [{"name": name.lower(), "type": name, "links": None} for name in ("IMAGE", "MASK")]
            node["outputs"] = [*node["outputs"], *extra]
            (x, y), (width, height) = node["pos"], node["size"]
            node["pos"], node["size"] = [x, y - _TALLER], [width, height + _TALLER]
        elif node["type"] in _FILES:
            values[:1] = [MLLM if "model_name" in _FILES[node["type"]] else ADAPTER]
            if node["type"] == "MoMALoad":
                values[2] = ADAPTER
        elif node["type"] == "EmptyLatentImage":
            values[:2] = [SIDE * value // 512 for value in values[:2]]
        elif node["type"] == "KSampler":
            values[1:4] = ["fixed", min(steps, values[2]), CFG]
        elif node["type"] == "MoMAStrengthStudy":
            values[4:6] = [min(steps, values[4]), CFG]
        node["widgets_values"] = [PROMPTS.get(v, v) if isinstance(v, str) else v for v in values]
    return changed
