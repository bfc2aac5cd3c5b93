"""The parts of `screenshots.py`, inside ComfyUI's Python: docs/images, web/docs/images and thumbnails in workflows/.

Pictures that a model makes are the small world's; nothing else is run.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from browser import SETTINGS, WINDOW, Editor, open_browser, open_editor
from comfyui_source import ROOT
from PIL import Image
from shown import note
from thumbnails import take_thumbnails

DOCS, HELP = ROOT / "docs" / "images", ROOT / "web" / "docs" / "images"
PHOTO = ROOT / "workbench" / "photo" / "photo_masked.png"
RUN = 1_800_000
LISTED = (
    "controlnet/control_v11p_sd15_openpose_fp16.safetensors",
    "background_removal/birefnet.safetensors",
    "loras/style.safetensors",
)
"""Files that workflows name and no picture needs the content of: with them, nothing is shown as missing."""


def workflow(name: str) -> dict[str, Any]:
    """A committed workflow."""
    return dict(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))


def take(editor: Editor, target: Path, kinds: tuple[str, ...] = (), width: int = 1400) -> None:
    """A picture of nodes, at most `width` wide."""
    target.parent.mkdir(parents=True, exist_ok=True)
    editor.picture(target, kinds)
    _shrink(target, width)


def _shrink(target: Path, width: int) -> None:
    image = Image.open(io.BytesIO(target.read_bytes())).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image.save(target, optimize=True)
    note(target)
    print(f"Wrote {target.relative_to(ROOT)}, {target.stat().st_size // 1024} kB", flush=True)


def workflows(editor: Editor) -> None:
    """Every workflow as it opens."""
    for path in sorted((ROOT / "workflows").glob("*.json")):
        if path.stem == "try_it":
            continue
        editor.load(workflow(path.stem), path.stem)
        editor.close_dialogs()
        take(editor, DOCS / f"{path.stem}.png")


def try_it(editor: Editor) -> None:
    """The small world's workflow after a run."""
    editor.load(workflow("try_it"), "try_it")
    editor.close_dialogs()
    editor.queue(RUN)
    take(editor, DOCS / "try_it.png", width=1100)


def nodes(editor: Editor) -> None:
    """Each node by itself, for its help page."""
    kinds = editor.page.evaluate("() => Object.keys(LiteGraph.registered_node_types).filter(k => k.startsWith('MoMA'))")
    for kind in sorted(kinds):
        editor.page.evaluate(
            """kind => {
                // Not cleared: a new node with an old node's id would show that one's values.
                for (const old of [...app.graph.nodes, ...app.graph.groups]) app.graph.remove(old)
                const node = LiteGraph.createNode(kind)
                node.pos = [100, 100]
                app.graph.add(node)
                node.setSize([Math.max(node.computeSize()[0], 340), node.computeSize()[1]])
            }""",
            kind,
        )
        editor.page.wait_for_timeout(300)
        take(editor, HELP / f"{kind}.png", (kind,), width=600)


def blueprint(editor: Editor) -> None:
    """The blueprint's node."""
    (path,) = (ROOT / "subgraphs").glob("*.json")
    editor.load(json.loads(path.read_text(encoding="utf-8")), path.stem)
    editor.close_dialogs()
    take(editor, DOCS / "blueprint.png")


def help_page(editor: Editor) -> None:
    """A node's help page beside its node."""
    editor.page.set_viewport_size({"width": 1300, "height": 760})
    editor.load(workflow("new_context"), "new_context")
    editor.close_dialogs()
    editor.open_help("MoMASelfAttnShortcut")
    editor.page.wait_for_timeout(2500)
    target = DOCS / "help_page.png"
    editor.page.screenshot(path=target, animations="disabled")
    _shrink(target, 1300)
    editor.page.set_viewport_size(WINDOW)


def previews(editor: Editor) -> None:
    """What the nodes show after a run."""
    editor.load(workflow("new_context"), "new_context_run")
    editor.close_dialogs()
    editor.queue(RUN)
    take(editor, DOCS / "preview_extract.png", ("MoMAExtractSubject",), width=900)
    take(editor, DOCS / "preview_tokens.png", ("MoMATextEncode",), width=900)
    take(editor, DOCS / "preview_mask.png", ("MoMASubjectMask",), width=900)
    take(editor, DOCS / "previews.png", width=1100)
    editor.page.evaluate(
        """() => {
            for (const node of app.graph.nodes) {
                const sampler = node.type === 'KSampler'
                const widget = (node.widgets ?? []).find(w => w.name === (sampler ? 'seed' : 'show_mask'))
                if (widget) widget.value = sampler ? 2 : true
                if (node.type === 'MoMAApplyAdapter') node.setSize([node.size[0], node.size[1] + 260])
                if (node.type === 'MoMASelfAttnShortcut') node.pos = [node.pos[0], node.pos[1] + 260]
            }
        }"""
    )
    editor.queue(RUN)
    take(editor, DOCS / "preview_live.png", ("MoMAApplyAdapter",), width=900)


def study(editor: Editor) -> None:
    """The strength study after a run."""
    editor.load(workflow("strength_study"), "strength_study_run")
    editor.close_dialogs()
    editor.queue(RUN)
    take(editor, DOCS / "strength_study_result.png", width=1100)


def artwork(editor: Editor) -> None:
    """The pack's icon and banner, from the drawings in `artwork/`."""
    page = editor.page.context.new_page()
    for drawing in (ROOT / "scripts" / "artwork").glob("*.svg"):
        page.set_content(f"<style>body {{ margin: 0 }} svg {{ display: block }}</style>{drawing.read_text('utf-8')}")
        target = DOCS / f"{drawing.stem}.png"
        page.locator("svg").screenshot(path=target, omit_background=True)
        note(target)
        print(f"Wrote {target.relative_to(ROOT)}", flush=True)
    page.close()


PARTS = {
    "workflows": workflows,
    "try_it": try_it,
    "nodes": nodes,
    "blueprint": blueprint,
    "previews": previews,
    "study": study,
    "help": help_page,
    "artwork": artwork,
}


THUMBNAILS = "thumbnails"
"""A part that needs no editor."""


def take_all(comfyui: Path, chosen: list[str]) -> None:
    """Take the pictures of the chosen parts, see `PARTS`; of all parts where none is chosen."""
    from workbench.bootstrap import bootstrap

    bootstrap()
    from workbench.comfy_server import ComfyServer
    from workbench.random_weights import adapter_file, llava_folder

    with tempfile.TemporaryDirectory(prefix="moma-screenshots-") as folder:
        mllm = llava_folder(Path(folder) / "MoMA_llava_7b")
        adapter_file(mllm)
        with ComfyServer(comfyui, Path(folder) / "server", {"moma/MoMA_llava_7b": mllm}) as server:
            shutil.copyfile(PHOTO, server.input / "example.png")
            for name in LISTED:
                (server.base / "models" / name).parent.mkdir(exist_ok=True)
                (server.base / "models" / name).touch()
            server.post("/settings", SETTINGS)
            if not chosen or THUMBNAILS in chosen:
                take_thumbnails(server)
            with open_browser() as browser, open_editor(browser, server.address) as editor:
                for name in chosen or PARTS:
                    if name != THUMBNAILS:
                        PARTS[name](editor)
