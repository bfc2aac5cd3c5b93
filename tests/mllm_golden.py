"""Compare the MLLM with recorded values of the original LLaVA code.

    COMFYUI_PATH=... python tests/mllm_golden.py --dir tests/data/mllm/tiny56

The folder holds checkpoint/, image.png, mask.png, mapping.safetensors, expected.json and expected.safetensors. Prints
`{"ids": bool, "pixel_values": max_abs, "last_hidden": max_abs, "mapped": max_abs}`, the worst over all prompts in fp32.
Exits 1 when ids differ or a value is above 5e-5.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent.parent))
from workbench.bootstrap import bootstrap

TOLERANCE = 5e-5


def compare(folder: Path) -> dict[str, Any]:
    """The errors over all cases of a folder."""
    bootstrap()
    import comfy.ops
    from comfyui_moma.moma_modules.adapter.networks import Mapping
    from comfyui_moma.moma_modules.mllm.encode import pixel_values, prompt_ids, subject_hidden_state
    from comfyui_moma.moma_modules.mllm.loading import load_mllm
    from comfyui_moma.moma_modules.subject.reference_image import prepare_references

    description = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    expected = load_file(folder / "expected.safetensors")
    mllm = load_mllm(folder / "checkpoint", "fp32", vision_heads=description.get("vision_heads"))
    references = prepare_references(_tensor(folder / "image.png", "RGB"), _tensor(folder / "mask.png", "L"))
    image, mask = references.images[0].numpy(), references.masks[0].numpy()
    weights = {key.removeprefix("mapping."): value for key, value in load_file(folder / "mapping.safetensors").items()}
    embedding, hidden = weights["gate_proj.weight"].shape
    mapping = Mapping(hidden, embedding, "cpu", torch.float32, comfy.ops.manual_cast)
    mapping.load_state_dict(weights)
    worst: dict[str, Any] = {
        "ids": True,
        "pixel_values": _difference(pixel_values(image, mask, mllm.image_size), expected["pixel_values"]),
        "last_hidden": 0.0,
        "mapped": 0.0,
    }
    for i, case in enumerate(description["cases"]):
        word, prompt = case["subject"], case["prompt"]
        worst["ids"] &= prompt_ids(mllm.tokenizer, word, prompt) == case["input_ids"]
        with torch.inference_mode():
            last = subject_hidden_state(mllm, image, mask, word, prompt)
            mapped = mapping(last)
        worst["last_hidden"] = max(worst["last_hidden"], _difference(last, expected[f"case{i}.last_hidden"]))
        worst["mapped"] = max(worst["mapped"], _difference(mapped, expected[f"case{i}.mapped"]))
    return worst


def failed(worst: dict[str, Any]) -> bool:
    """Whether ids differ or an error is above the tolerance (or NaN)."""
    return not worst["ids"] or any(not worst[key] <= TOLERANCE for key in ("pixel_values", "last_hidden", "mapped"))


def _tensor(path: Path, mode: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert(mode), np.float32) / 255)[None]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs.view_as(ours)).abs().max())


def main() -> int:
    """Check the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    worst = compare(parser.parse_args().dir)
    print(json.dumps(worst))
    return int(failed(worst))


if __name__ == "__main__":
    sys.exit(main())
