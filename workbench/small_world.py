"""The small world's weights, which come with the pack: what they are called, and graphs of others with them."""

import copy
from typing import Any

CHECKPOINT, MLLM, ADAPTER = "moma_mini.safetensors", "moma_mini_llava", "moma_mini_adapter.safetensors"
EXAMPLE = "striped cup"
SIDE, STEPS, CFG = 128, 20, 4.0

_FILES = {
    "MoMALoad": {"model_name": MLLM, "adapter_name": ADAPTER},
    "MoMALoadMLLM": {"model_name": MLLM},
    "MoMALoadAdapter": {"adapter_name": ADAPTER},
}


def in_small_world(prompt: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """An API prompt for photographs with these weights: files, sizes and steps change; what is wired does not."""
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {"class_type": "MoMALoadMini", "_meta": {"title": "Load MoMA Checkpoint"}}
            node["inputs"] = {"ckpt_name": CHECKPOINT, "example": EXAMPLE}
        inputs = node["inputs"]
        inputs |= _FILES.get(node["class_type"], {})
        if "steps" in inputs:
            inputs |= {"steps": min(steps, inputs["steps"]), "cfg": CFG}
        for side in ("width", "height"):
            if node["class_type"] == "EmptyLatentImage" and isinstance(inputs[side], int):
                inputs[side] = SIDE * inputs[side] // 512
    return changed
