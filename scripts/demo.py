"""The main job, `python3 scripts/demo.py`: a picture, a word and a prompt go through ComfyUI; results lie in output/.

Does its own set-up. Uses the user's ComfyUI (`COMFYUI_PATH`, or the one in whose custom_nodes this lies) and the
weights in its models folders; without them it makes small random ones, and says so.
"""

import argparse
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

from comfyui_source import ROOT, SetupError, add_workbench, cache_dir
from setup_env import environment

INSIDE = "COMFYUI_MOMA_DEMO"
PROMPT = ROOT / "tests" / "api" / "new_context.json"
PHOTO, MASK = (ROOT / "workbench" / "photo" / name for name in ("photo.jpg", "mask.png"))
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
MLLM = "MoMA_llava_7b"
SD15_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SD15_SHAPE = [320, 768]
NOISE = """The weights were random, so the picture is noise. What this shows: the pack loads in ComfyUI, and the whole
graph runs through the server: a small LLaVA checkpoint of the published format, a full-size adapter and SD1.5 model,
extraction, both patches in the sampler, the subject mask, decoding."""


@dataclass(frozen=True)
class Weights:
    """What the graph loads, by ComfyUI's names, and what must be linked into the models folder for that."""

    checkpoint: str
    mllm: str
    adapter: str
    links: dict[str, Path]
    real: bool


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", type=Path, help="a picture of the subject (default: a cup)")
    parser.add_argument(
        "--mask", type=Path, help="white on the subject (default: the picture's transparency, else all)"
    )
    parser.add_argument("--subject", default="cup", help="the word for it")
    parser.add_argument("--prompt", default="A cup on a beach at sunset.", help="what the new picture shows")
    parser.add_argument("--checkpoint", help="name of an SD1.5 checkpoint in models/checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 50, or 4 with random weights")
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
        real=True,
    )


def is_sd15(path: Path) -> bool:
    """Whether a safetensors file's header is that of an SD1.5 checkpoint."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError):
        return False
    return bool(header.get(SD15_KEY, {}).get("shape") == SD15_SHAPE)


def random_weights(folder: Path) -> Weights:
    """Seeded random weights of the real formats; the checkpoint is kept in the cache."""
    from workbench.random_weights import adapter_file, llava_folder, sd15_checkpoint

    adapter = adapter_file(llava_folder(folder / MLLM))
    links = {f"checkpoints/{CHECKPOINT}": sd15_checkpoint(cache_dir()), f"moma/{MLLM}": folder / MLLM}
    return Weights(CHECKPOINT, MLLM, f"{MLLM}/{adapter.name}", links, real=False)


def build_prompt(weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """The committed workflow with these weights and wishes."""
    prompt: dict[str, Any] = json.loads(PROMPT.read_text(encoding="utf-8"))
    size = 512 if weights.real else 256
    changes: dict[str, dict[str, Any]] = {
        "CheckpointLoaderSimple": {"ckpt_name": weights.checkpoint},
        "LoadImage": {"image": "reference.png"},
        "MoMALoadMLLM": {"model_name": weights.mllm},
        "MoMALoadAdapter": {"adapter_name": weights.adapter},
        "MoMAExtractSubject": {"subject": options.subject, "prompt": options.prompt},
        "EmptyLatentImage": {"width": size, "height": size},
        "KSampler": {"seed": options.seed, "steps": options.steps or (50 if weights.real else 4)},
    }
    for node in prompt.values():
        node["inputs"] |= changes.get(node["class_type"], {})
    return prompt


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


def side_by_side(reference_image: Any, mask: Any, image: Any) -> Any:
    """Reference, picture and subject mask (red where the subject is not) with their names below."""
    from PIL import Image, ImageDraw

    size, line = image.height, 24
    opaque = reference_image.convert("RGB").resize((size, size))
    shade = Image.composite(image, Image.new("RGB", image.size, (160, 0, 0)), mask.convert("L").resize(image.size))
    parts = {"reference": opaque, "new picture": image, "subject mask": Image.blend(image, shade, 0.6)}
    sheet = Image.new("RGB", (sum(part.width for part in parts.values()), size + line), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for name, part in parts.items():
        sheet.paste(part, (left, 0))
        draw.text((left + 6, size + 6), name, fill="black")
        left += part.width
    return sheet


def run_inside(comfyui: Path, options: argparse.Namespace) -> None:
    """With ComfyUI's Python: find or make weights, run the graph on a server, keep the pictures."""
    add_workbench()
    from workbench.bootstrap import bootstrap

    bootstrap()
    import torch
    from PIL import Image

    from workbench.comfy_server import ComfyServer, ServerError

    with tempfile.TemporaryDirectory(prefix="moma-demo-") as folder:
        weights = own_weights(comfyui, options.checkpoint)
        if isinstance(weights, list):
            print("No real weights: " + "; ".join(weights) + ".\nGoing on with small random ones.", flush=True)
            weights = random_weights(Path(folder) / "weights")
        try:
            picture = reference(options)
        except OSError as error:
            sys.exit(f"error: the picture or its mask cannot be read: {error}")
        prompt = build_prompt(weights, options)
        arguments = () if torch.cuda.is_available() else ("--cpu",)
        print(f"Starting ComfyUI ({comfyui}) ...", flush=True)
        try:
            with ComfyServer(comfyui, Path(folder) / "server", weights.links, arguments) as server:
                picture.save(server.input / "reference.png")
                run = server.run(prompt, show_progress(prompt))
                kinds = {node["class_type"]: name for name, node in prompt.items()}
                image, mask = (
                    Image.open(io.BytesIO(server.view(run.files(kinds[kind])[0]))).convert("RGB")
                    for kind in ("SaveImage", "MoMASubjectMask")
                )
        except ServerError as error:
            sys.exit(f"error: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    sheets = {"image": image, "mask": mask, "side_by_side": side_by_side(picture, mask, image)}
    for name, sheet in sheets.items():
        sheet.save(options.output / f"{name}.png")
        print(f"Wrote {options.output / name}.png")
    if not weights.real:
        print(NOISE)


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
