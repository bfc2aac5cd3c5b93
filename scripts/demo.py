"""The main job, `python3 scripts/demo.py`: a picture, a word and a prompt go through ComfyUI; results lie in output/.

Does its own set-up. Uses the user's ComfyUI (`COMFYUI_PATH`, or the one in whose custom_nodes this lies) and the
weights in its models folders; without them the small world that comes with the pack, and says so.
"""

import argparse
import copy
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui_source import ROOT, SetupError, add_workbench
from setup_env import environment

INSIDE = "COMFYUI_MOMA_DEMO"
REFERENCE = "reference.png"
PROMPT, TRY_IT = (ROOT / "tests" / "api" / f"{name}.json" for name in ("photographs/new_context", "try_it"))
PHOTO, MASK = (ROOT / "workbench" / "photo" / name for name in ("photo.jpg", "mask.png"))
SD15_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SD15_SHAPE = [320, 768]


@dataclass(frozen=True)
class Weights:
    """What the graph loads, by ComfyUI's names, and what must be linked into the models folder for that."""

    checkpoint: str
    mllm: str
    adapter: str
    links: dict[str, Path]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", type=Path, help="a picture of the subject (default: a cup)")
    parser.add_argument(
        "--mask", type=Path, help="white on the subject (default: the picture's transparency, else all)"
    )
    parser.add_argument("--subject", default="cup", help="the word for it")
    parser.add_argument("--prompt", help="what the new picture shows")
    parser.add_argument("--checkpoint", help="name of an SD1.5 checkpoint in models/checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 50, or 20 in the small world")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures")
    return parser.parse_args()


def reference(options: argparse.Namespace) -> Any:
    """The reference as ComfyUI's mask editor saves one: transparent where the mask is."""
    from PIL import Image

    image = Image.open(options.image or PHOTO)
    mask_file = options.mask or (None if options.image else MASK)
    if mask_file:
        mask = Image.open(mask_file).convert("L").resize(image.size)
    elif image.mode in ("RGBA", "LA"):
        mask = image.getchannel("A")
    else:
        mask = Image.new("L", image.size, 255)
    picture = image.convert("RGB")
    picture.putalpha(mask.point(lambda value: 255 - value))
    return picture


def own_weights(comfyui: Path, checkpoint: str | None) -> Weights | list[str]:
    """The weights in a ComfyUI's models folder, or what is missing there."""
    from comfyui_moma.moma_modules.mllm.checkpoint_files import find_checkpoints

    models = comfyui / "models"
    checkpoints = sorted((models / "checkpoints").rglob("*.safetensors"))
    if checkpoint:
        checkpoints = [
            path for path in checkpoints if checkpoint in (path.name, str(path.relative_to(models / "checkpoints")))
        ]
    found = next((path for path in checkpoints if is_sd15(path)), None)
    mllms = find_checkpoints([models / "moma"])
    adapters = sorted((models / "moma").rglob("*.th"))
    missing = [
        f"{what} in {models / folder}"
        for what, folder, there in (
            (f"an SD1.5 checkpoint{f' named {checkpoint}' if checkpoint else ''}", "checkpoints", found),
            ("an MLLM folder", "moma", mllms),
            ("attn_adapters_projectors.th", "moma", adapters),
        )
        if not there
    ]
    if found is None or missing:
        return missing
    return Weights(
        checkpoint=str(found.relative_to(models / "checkpoints")),
        mllm=next(iter(mllms)),
        adapter=adapters[0].relative_to(models / "moma").as_posix(),
        links={name: models / name for name in ("checkpoints", "moma")},
    )


def is_sd15(path: Path) -> bool:
    """Whether a safetensors file's header is that of an SD1.5 checkpoint."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError):
        return False
    return bool(header.get(SD15_KEY, {}).get("shape") == SD15_SHAPE)


def prompt_of_weights(weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """The workflow *new_context* with these weights and wishes, and beside it the same without MoMA."""
    prompt: dict[str, Any] = json.loads(PROMPT.read_text(encoding="utf-8"))
    changes: dict[str, dict[str, Any]] = {
        "CheckpointLoaderSimple": {"ckpt_name": weights.checkpoint},
        "LoadImage": {"image": REFERENCE},
        "MoMALoadMLLM": {"model_name": weights.mllm},
        "MoMALoadAdapter": {"adapter_name": weights.adapter},
        "MoMAExtractSubject": {"subject": options.subject, "prompt": options.prompt or "A cup on a beach."},
        "KSampler": {"seed": options.seed, "steps": options.steps or 50},
    }
    change(prompt, changes)
    return prompt


def prompt_of_small_world(options: argparse.Namespace) -> dict[str, Any]:
    """The workflow *try_it* with these wishes; with a prompt or picture of the user's own its first half only."""
    prompt: dict[str, Any] = json.loads(TRY_IT.read_text(encoding="utf-8"))
    if options.prompt or options.image:
        first = next(name for name, node in prompt.items() if "context" in node["inputs"].get("filename_prefix", ""))
        prompt = {name: prompt[name] for name in upstream(prompt, first)}
        asked = options.prompt or f"A {options.subject} on the moon."
        change(prompt, {"MoMAExtractSubject": {"subject": options.subject, "prompt": asked}})
    if options.image:
        prompt["picture"] = {"class_type": "LoadImage", "inputs": {"image": REFERENCE}, "_meta": {"title": "Picture"}}
        change(prompt, {"MoMALoadMini": {"image": ["picture", 0], "mask": ["picture", 1]}})
    change(prompt, {"KSampler": {"seed": options.seed, "steps": options.steps or 20}})
    return prompt


def upstream(prompt: dict[str, Any], node: str) -> list[str]:
    """A node and all that it needs, in the prompt's order."""
    found, left = {node}, [node]
    while left:
        links = [value for value in prompt[left.pop()]["inputs"].values() if isinstance(value, list)]
        left += [name for name, _ in links if name not in found]
        found |= {name for name, _ in links}
    return [name for name in prompt if name in found]


def change(prompt: dict[str, Any], changes: dict[str, dict[str, Any]]) -> None:
    """Set inputs of all nodes of a class."""
    for node in prompt.values():
        node["inputs"] |= changes.get(node["class_type"], {})


def with_comparison(prompt: dict[str, Any]) -> list[dict[str, str]]:
    """Add to each sampler its twin without MoMA, and the subject mask: the ids of the nodes that give pictures."""
    answers = []
    for name, node in list(prompt.items()):
        if node["class_type"] != "KSampler":
            continue
        decode = next(each for each in prompt.values() if each["inputs"].get("samples") == [name, 0])
        decoded = next(key for key, each in prompt.items() if each is decode)
        saved = next(key for key, each in prompt.items() if each["inputs"].get("images") == [decoded, 0])
        model = node["inputs"]["model"]
        while "MoMA" in prompt[model[0]]["class_type"] and "model" in prompt[model[0]]["inputs"]:
            model = prompt[model[0]]["inputs"]["model"]

        def title(text: str) -> dict[str, Any]:
            return {"_meta": {"title": text}}

        prompt[f"{name}p"] = {**copy.deepcopy(node), **title("The same without MoMA")}
        prompt[f"{name}p"]["inputs"]["model"] = model
        vae = decode["inputs"]["vae"]
        prompt |= {
            f"{name}d": {
                "class_type": "VAEDecode",
                "inputs": {"samples": [f"{name}p", 0], "vae": vae},
                **title("VAE Decode"),
            },
            f"{name}s": {"class_type": "PreviewImage", "inputs": {"images": [f"{name}d", 0]}, **title("Preview Image")},
            f"{name}m": {
                "class_type": "MoMASubjectMask",
                "inputs": {"model": node["inputs"]["model"], "latent": [name, 0]},
                **title("MoMA Subject Mask"),
            },
        }
        answers.append({"with": saved, "without": f"{name}s", "mask": f"{name}m"})
    return answers


def show_progress(prompt: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Prints each node as it starts, and a bar below while it reports steps."""

    def show(event: dict[str, Any]) -> None:
        data = event["data"]
        if event["type"] == "executing" and data["node"]:
            print(f"  {prompt[data['node']]['_meta']['title']}", flush=True)
        elif event["type"] == "progress":
            done = int(20 * data["value"] / data["max"])
            end = "\n" if data["value"] >= data["max"] else "\r"
            print(f"    [{'#' * done}{'.' * (20 - done)}] {data['value']}/{data['max']}", end=end, flush=True)

    return show


def side_by_side(parts: dict[str, Any]) -> Any:
    """Pictures with their names below."""
    from PIL import Image, ImageDraw

    size, line = max(256, max(part.height for part in parts.values())), 24
    sheet = Image.new("RGB", (size * len(parts), size + line), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, part) in enumerate(parts.items()):
        sheet.paste(part.convert("RGB").resize((size, size)), (i * size, 0))
        draw.text((i * size + 6, size + 6), name, fill="black")
    return sheet


def shaded(image: Any, mask: Any) -> Any:
    """A picture, red where the subject is not."""
    from PIL import Image

    shade = Image.composite(image, Image.new("RGB", image.size, (160, 0, 0)), mask.convert("L").resize(image.size))
    return Image.blend(image, shade, 0.6)


def run_inside(comfyui: Path, options: argparse.Namespace) -> None:
    """With ComfyUI's Python: find weights, run the graph on a server, keep the pictures and say what came through."""
    add_workbench()
    from workbench.bootstrap import bootstrap

    bootstrap()
    import numpy as np
    import torch
    from comfyui_moma.moma_modules.mini.choices import load_example
    from PIL import Image

    from workbench.comfy_server import ComfyServer, ServerError
    from workbench.likeness import colour_likeness

    with tempfile.TemporaryDirectory(prefix="moma-demo-") as folder:
        weights = own_weights(comfyui, options.checkpoint)
        try:
            picture = None if isinstance(weights, list) and not options.image else reference(options)
        except OSError as error:
            sys.exit(f"error: the picture or its mask cannot be read: {error}")
        if isinstance(weights, list):
            print("No weights for photographs: " + "; ".join(weights) + ".")
            print("Going on with the small world that comes with the pack: painted things, 128x128.", flush=True)
            prompt, links = prompt_of_small_world(options), {}
        else:
            prompt, links = prompt_of_weights(weights, options), weights.links
        answers = with_comparison(prompt)
        arguments = () if torch.cuda.is_available() else ("--cpu",)
        print(f"Starting ComfyUI ({comfyui}) ...", flush=True)
        try:
            with ComfyServer(comfyui, Path(folder) / "server", links, arguments) as server:
                if picture is not None:
                    picture.save(server.input / REFERENCE)
                run = server.run(prompt, show_progress(prompt))

                def shown(node: str) -> Any:
                    return Image.open(io.BytesIO(server.view(run.files(node)[0]))).convert("RGB")

                found = [{part: shown(node) for part, node in answer.items()} for answer in answers]
        except ServerError as error:
            sys.exit(f"error: {error}")
    if picture is None:
        image, mask = load_example(
            next(node for node in prompt.values() if "example" in node["inputs"])["inputs"]["example"]
        )
        subject, where = (image[0].numpy() * 255).astype(np.uint8), mask[0].numpy()
    else:
        subject, where = np.asarray(picture.convert("RGB")), 1 - np.asarray(picture.getchannel("A")) / 255
    options.output.mkdir(parents=True, exist_ok=True)
    for i, parts in enumerate(found, 1):
        prompted = [node["inputs"]["prompt"] for node in prompt.values() if node["class_type"] == "MoMAExtractSubject"]
        sheets = {"reference": Image.fromarray(subject), "without MoMA": parts["without"], "with MoMA": parts["with"]}
        sheets["subject mask"] = shaded(parts["with"], parts["mask"])
        end = "" if len(found) == 1 else f"_{i}"
        parts["with"].save(options.output / f"image{end}.png")
        parts["mask"].save(options.output / f"mask{end}.png")
        side_by_side(sheets).save(options.output / f"side_by_side{end}.png")
        print(f"{prompted[i - 1]!r}: wrote {options.output}/image{end}.png, mask{end}.png, side_by_side{end}.png")
        place = np.asarray(parts["mask"])[..., 0] / 255
        if place.max() > 0.5:
            likeness = {
                name: colour_likeness(np.asarray(parts[name].resize(place.shape[::-1])), place, subject, where)
                for name in ("with", "without")
            }
            print(
                f"  Colours of the subject found where the subject is: {likeness['with']:.0%} with MoMA, "
                f"{likeness['without']:.0%} without."
            )


def main() -> None:
    """Set up, then go on inside ComfyUI's Python."""
    options = parse_arguments()
    try:
        if inside := os.environ.get(INSIDE):
            run_inside(Path(inside), options)
            return
        found = environment()
    except SetupError as error:
        sys.exit(f"error: {error}")
    variables = {**found.variables(), INSIDE: str(found.comfyui)}
    sys.exit(subprocess.run([found.python, __file__, *sys.argv[1:]], env=variables, check=False).returncode)


if __name__ == "__main__":
    main()
