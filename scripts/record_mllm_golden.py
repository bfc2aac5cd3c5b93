"""Records anew what LLaVA's own code computes: `python scripts/record_mllm_golden.py --llava-repo CHECKOUT`.

Reads checkpoint, picture, mask and cases of `tests/data/mllm/tiny56`, and writes `expected.safetensors`. The checkout
is one of github.com/haotian-liu/LLaVA, at the commit that `expected.json` names. Its code wants old packages, in a
folder of their own before ComfyUI's: `pip install --no-deps --target DIR transformers==4.37.2 tokenizers==0.15.2
huggingface_hub==0.36.0`, and DIR in PYTHONPATH.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "mllm" / "tiny56"
SIDE = 512


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].partition(":")[0])
    parser.add_argument("--llava-repo", required=True, type=Path, help="a checkout of LLaVA's code")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="the folder of the cases (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder for the record; default: that of the cases")
    return parser.parse_args()


def main() -> None:
    """Record, and say how far it is from what was there."""
    options = parse_arguments()
    sys.path.insert(0, str(options.llava_repo))
    golden = options.golden
    described = json.loads((golden / "expected.json").read_text(encoding="utf-8"))
    try:
        from llava.mm_utils import process_images

        model, tokenizer, processor = _load(golden / "checkpoint", described["vision_config"])
    except ImportError as error:
        sys.exit(f"error: --llava-repo {options.llava_repo}: {error}. See this file's beginning for what it needs.")
    import torch
    from safetensors.torch import load_file, save_file

    mapping = {key.split(".")[1]: value for key, value in load_file(golden / "mapping.safetensors").items()}
    picture = _on_white(golden / "image.png", golden / "mask.png")
    pixels = process_images([picture], processor, model.config)
    recorded: dict[str, Any] = {"pixel_values": pixels}
    for number, case in enumerate(described["cases"]):
        ids = _ids(tokenizer, case["subject"], case["prompt"])
        if ids.tolist() != case["input_ids"]:
            sys.exit(f"error: case {number} has other ids than expected.json says: {ids.tolist()}")
        with torch.inference_mode():
            last = _last_hidden(model, ids[None], pixels)
            silu = torch.nn.functional.silu(last @ mapping["gate_proj"].T)
            recorded[f"case{number}.last_hidden"] = last
            recorded[f"case{number}.mapped"] = (silu * (last @ mapping["up_proj"].T)) @ mapping["down_proj"].T
    before = load_file(golden / "expected.safetensors")
    worst = max(float((value - before[name].view_as(value)).abs().max()) for name, value in recorded.items())
    print(f"{worst:.1e} from the record before")
    out = options.out or golden
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in recorded.items()}, out / "expected.safetensors")


def _load(folder: Path, vision_config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Model in fp32, tokenizer and image processor; the vision tower is made here, as its own set-up asks the hub."""
    import torch
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_projector.builder import build_vision_projector
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tower_name = described.pop("mm_vision_tower")  # with it, the model would ask the hub
    config = LlavaConfig(**described)
    model = LlavaLlamaForCausalLM(config)
    tower = CLIPVisionTower.__new__(CLIPVisionTower)
    torch.nn.Module.__init__(tower)
    tower.vision_tower = CLIPVisionModel(CLIPVisionConfig(**vision_config))
    tower.select_layer, tower.select_feature = config.mm_vision_select_layer, config.mm_vision_select_feature
    tower.vision_tower_name, tower.is_loaded = tower_name, True
    model.model.vision_tower = tower
    model.model.mm_projector = build_vision_projector(config)
    weights: dict[str, Any] = {}
    for shard in sorted(folder.glob("pytorch_model-*.bin")):
        weights |= torch.load(shard, map_location="cpu", weights_only=True)
    missing, unknown = model.float().load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    if [name for name in missing if "position_ids" not in name] or [name for name in unknown if "inv_freq" not in name]:
        sys.exit(f"error: {folder} and the model do not have the same tensors: {missing} {unknown}")
    side = vision_config["image_size"]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model.eval(), LlamaTokenizer.from_pretrained(folder, legacy=True), processor


def _on_white(image: Path, mask: Path) -> Any:
    """The picture as the released code shows it: its subject on white, 512x512."""
    import numpy as np
    from PIL import Image

    both = [Image.open(path).convert(mode).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            for path, mode in ((image, "RGB"), (mask, "L"))]  # fmt: skip
    pixels, covered = (np.asarray(one) for one in both)
    return Image.fromarray(np.where((covered > 0)[..., None], pixels, 255).astype(np.uint8))


def _ids(tokenizer: Any, word: str, prompt: str) -> Any:
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token

    asked = f"USER: <image>\n A photo of a {word}. Describe a new image of the same {word} in: {prompt}. ASSISTANT: *"
    return tokenizer_image_token(asked, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")


def _last_hidden(model: Any, ids: Any, pixels: Any) -> Any:
    """Of the last token, after the last norm [1, hidden]."""
    import torch

    positions, attended = torch.arange(ids.shape[1])[None], torch.ones_like(ids)
    _, positions, attended, _, embedded, _ = model.prepare_inputs_labels_for_multimodal(
        ids, positions, attended, None, None, pixels
    )
    found = model.model(inputs_embeds=embedded, attention_mask=attended, position_ids=positions, return_dict=True)
    return found[0][:, -1]


if __name__ == "__main__":
    main()
