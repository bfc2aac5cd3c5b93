"""The template browser's pictures of the workflows: the subject, and what comes of it in the small world."""

import io
import json
from pathlib import Path
from typing import Any

from comfyui_source import ROOT
from PIL import Image, ImageDraw, ImageFont, ImageOps
from shown import THUMBNAILS, note

SIZE = (768, 512)
_GROUND, _INK, _EDGE, _LINE = (24, 24, 24), (230, 230, 230), 16, 26


def take_thumbnails(server: Any) -> None:
    """Run each through the server and write its picture into workflows/."""
    for name, title in THUMBNAILS.items():
        prompt = json.loads((ROOT / "tests" / "api" / f"{name}.json").read_text("utf-8"))
        run = server.run(prompt)
        saved = [node for node, content in prompt.items() if content["class_type"] == "SaveImage"]
        drawn = [Image.open(io.BytesIO(server.view(run.files(node)[0]))).convert("RGB") for node in saved]
        words = [_asked(prompt, node) for node in saved]
        parts = list(zip(words, drawn, strict=True))
        whole = name == "strength_study"  # A sheet, which wants all the place there is.
        _write(ROOT / "workflows" / f"{name}.jpg", title, parts if whole else [*_examples(prompt), *parts])


def _examples(prompt: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """The pictures that the small world's loaders give, each with its mask in a corner."""
    names = [node["inputs"]["example"] for node in prompt.values() if node["class_type"] == "MoMALoadMini"]
    files = [ROOT / "weights" / "examples" / f"{name.replace(' ', '_')}.png" for name in names]
    return [("The subject and its mask", _with_mask(Image.open(file).convert("RGBA"))) for file in files]


def _with_mask(picture: Image.Image) -> Image.Image:
    """A picture that is transparent where its subject is; that in white."""
    shown, side = picture.convert("RGB"), picture.width // 3
    mask = ImageOps.invert(picture.getchannel("A").resize((side, side), Image.Resampling.LANCZOS)).convert("RGB")
    shown.paste(ImageOps.expand(mask, 1, _INK), (picture.width - side - 2, picture.height - side - 2))
    return shown


def _asked(prompt: dict[str, Any], node: str) -> str:
    """The prompt on the way to a node, found by following positive prompts and subjects back."""
    inputs = prompt[node]["inputs"]
    if inputs.get("prompt"):
        return str(inputs["prompt"])
    for name in ("images", "samples", "latent_image", "positive", "conditioning_1", "conditioning", "subject"):
        if isinstance(inputs.get(name), list) and (found := _asked(prompt, inputs[name][0])):
            return found
    return ""


def _write(target: Path, title: str, parts: list[tuple[str, Image.Image]]) -> None:
    """Pictures with their words below, as large as they fit side by side, or in two rows where there are four."""
    canvas = Image.new("RGB", SIZE, _GROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_EDGE, _EDGE), title, _INK, ImageFont.load_default(28))
    columns = 2 if len(parts) == 4 else len(parts)
    rows = -(-len(parts) // columns)
    top = 2 * _EDGE + 28
    width = (SIZE[0] - (columns + 1) * _EDGE) // columns
    height = (SIZE[1] - top) // rows - _LINE - _EDGE
    for i, (words, part) in enumerate(parts):
        scale = min(width / part.width, height / part.height)
        shown = part.resize((round(part.width * scale), round(part.height * scale)), Image.Resampling.LANCZOS)
        left = _EDGE + (i % columns) * (width + _EDGE) + (width - shown.width) // 2
        upper = top + (i // columns) * (height + _LINE + _EDGE) + (height - shown.height) // (2 if rows == 1 else 1)
        canvas.paste(shown, (left, upper))
        draw.text((left, upper + shown.height + 4), words, _INK, ImageFont.load_default(15))
    canvas.save(target, quality=85)
    note(target)
    print(f"Wrote {target.relative_to(ROOT)}", flush=True)
