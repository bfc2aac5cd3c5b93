"""The template browser's pictures of the workflows.

Of those that the small world can run: the subject, and what comes of it. Of the others: the graph.
"""

import io
import json
from pathlib import Path
from typing import Any

from comfyui_source import ROOT
from PIL import Image, ImageDraw, ImageFont

SIZE = (768, 512)
TITLES = {
    "new_context": "New context",
    "simple": "One subject, one prompt",
    "new_texture": "New texture",
    "two_subjects": "Two subjects, each with its region",
    "hires_fix": "A second pass at twice the size",
    "prompts": "Several prompts in one run",
    "from_subject": "From a saved subject, without the language model",
    "strength_study": "Strength study",
    "try_it": "Try it: nothing to download",
}
"""In the order in which they are run: the first saves the subject that from_subject loads."""

_GROUND, _INK, _EDGE, _LINE = (24, 24, 24), (230, 230, 230), 16, 26


def take_thumbnails(server: Any) -> None:
    """Run each through the server and write its picture into workflows/."""
    for name, title in TITLES.items():
        prompt = json.loads((ROOT / "tests" / "api" / f"{name}.json").read_text("utf-8"))
        run = server.run(prompt)
        saved = [node for node, content in prompt.items() if content["class_type"] == "SaveImage"]
        drawn = [Image.open(io.BytesIO(server.view(run.files(node)[0]))).convert("RGB") for node in saved]
        words = [_asked(prompt, node) for node in saved]
        parts = list(zip(words, drawn, strict=True))
        whole = name == "strength_study"  # A sheet, which wants all the place there is.
        _write(ROOT / "workflows" / f"{name}.jpg", title, parts if whole else [*_examples(prompt), *parts])


def thumbnail(picture: Path, target: Path) -> None:
    """A picture of a graph on a canvas of the thumbnails' shape."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail(SIZE, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", SIZE, _GROUND)
    canvas.paste(image, ((SIZE[0] - image.width) // 2, (SIZE[1] - image.height) // 2))
    canvas.save(target, quality=85)
    print(f"Wrote {target.relative_to(ROOT)}", flush=True)


def _examples(prompt: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """The pictures that the small world's loaders give."""
    names = [node["inputs"]["example"] for node in prompt.values() if node["class_type"] == "MoMALoadMini"]
    files = [ROOT / "weights" / "examples" / f"{name.replace(' ', '_')}.png" for name in names]
    return [("The subject", Image.open(file).convert("RGB")) for file in files]


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
    print(f"Wrote {target.relative_to(ROOT)}", flush=True)
