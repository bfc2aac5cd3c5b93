"""The committed workflows, and random weights of the formats that they name."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workbench import ROOT
from workbench.comfy_server import ComfyServer, Prompt
from workbench.random_weights import sd15_checkpoint
from workbench.small_world import CHECKPOINT as SMALL_CHECKPOINT
from workbench.tiny_models import seeded_weight

API = ROOT / "tests" / "api"
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
STARTS_SMALL = tuple(path.stem for path in sorted((API / "photographs").glob("*.json")))
"""Those with a part that is off when they open: the user's picture, and what needs a file of its own."""
NEWER_NODES = {"auto_mask": "RemoveBackground"}
"""Workflows whose part that is off has a core node that the oldest supported ComfyUI does not have."""
CHECKPOINT = "checkpoints/v1-5-pruned-emaonly-fp16.safetensors"
CONTROLNET = "controlnet/control_v11p_sd15_openpose_fp16.safetensors"
BIREFNET = "background_removal/birefnet.safetensors"
LORA = "loras/style.safetensors"


def api(name: str) -> Prompt:
    """A committed API prompt."""
    return dict(json.loads((API / f"{name}.json").read_text(encoding="utf-8")))


def photographs(name: str) -> Prompt:
    """The committed API prompt of one that starts in the small world, switched to photographs."""
    return api(f"photographs/{name}")


def workflow(name: str) -> dict[str, Any]:
    """A committed workflow as the editor saves it."""
    return dict(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))


def known_to(info: dict[str, Any]) -> list[str]:
    """The workflows all of whose nodes a server has; only the ones in `NEWER_NODES` may be missing."""
    kinds = {
        name: {n["class_type"] for n in (photographs if name in STARTS_SMALL else api)(name).values()} for name in NAMES
    }
    names = [name for name in NAMES if kinds[name] <= set(info)]
    assert set(NAMES) - set(names) <= set(NEWER_NODES)
    return names


def small(prompt: Prompt, size: int = 128, steps: int = 1) -> Prompt:
    """The same graph at a size for a CPU, with the test's photograph; a size that comes by a link stays."""
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "LoadImage":
            inputs["image"] = "photo_masked.png"
        elif node["class_type"] == "EmptyLatentImage" and not isinstance(inputs["width"], list):
            inputs |= {"width": size, "height": size}
        elif "steps" in inputs:
            inputs["steps"] = steps
    return prompt


def add_weights(server: ComfyServer, cache: Path, folder: Path) -> None:
    """Put a random ControlNet, LoRA and, where the server can load it, BiRefNet into its models."""
    makers = {CONTROLNET: _controlnet, LORA: _lora}
    if NEWER_NODES["auto_mask"] in server.object_info():
        makers[BIREFNET] = _birefnet
    for name, make in makers.items():
        path = folder / Path(name).name
        make(path, cache)
        server.add_model(name, path)


def _controlnet(path: Path, cache: Path) -> None:
    """The encoder of the random checkpoint's UNet, with zero convolutions that are not zero."""
    weights: dict[str, torch.Tensor] = {}
    prefix = "model.diffusion_model."
    with safe_open(sd15_checkpoint(cache), "pt") as file:
        keys = file.keys()
        for key in keys:
            if key.startswith(tuple(prefix + part for part in ("time_embed", "input_blocks", "middle_block"))):
                weights["control_model." + key.removeprefix(prefix)] = file.get_tensor(key)
    channels = (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280)
    names = [(f"zero_convs.{i}.0", c, c, 1) for i, c in enumerate(channels)] + [("middle_block_out.0", 1280, 1280, 1)]
    hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    names += [(f"input_hint_block.{2 * i}", hint[i + 1], hint[i], 3) for i in range(8)]
    for name, out, into, side in names:
        weights[f"control_model.{name}.weight"] = seeded_weight(5, name, (out, into, side, side)).half()
        weights[f"control_model.{name}.bias"] = torch.zeros(out).half()
    save_file(weights, path)


def _lora(path: Path, _: Path) -> None:
    """A LoRA of rank 4 on one attention layer of the small world's UNet."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    with safe_open(ROOT / "weights" / SMALL_CHECKPOINT, "pt") as file:
        layer = file.get_slice("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
        out, into = layer.get_shape()
    weights = {f"{name}.lora_down.weight": (4, into), f"{name}.lora_up.weight": (out, 4)}
    save_file({key: seeded_weight(6, key, shape) for key, shape in weights.items()}, path)


def _birefnet(path: Path, _: Path) -> None:
    """All weights of ComfyUI's own class, random."""
    import comfy.ops
    from comfy.background_removal.birefnet import BiRefNet

    state = BiRefNet({}, torch.float16, torch.device("cpu"), comfy.ops.disable_weight_init).state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            state[key] = torch.ones_like(value)
        elif value.is_floating_point():
            state[key] = seeded_weight(7, key, tuple(value.shape)).half()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
