"""Each template opened from the template browser of the oldest, the pinned and the newest editor, and run to a picture.

On a server with the pack and what a fresh ComfyUI has. With `MOMA_EVERY_TEMPLATE` set all of them run in each editor,
with all their steps, which takes ten minutes; otherwise with one step, in the pinned editor all of which no
other has the same graph or one that repeats it, in the others a few.
"""

import io
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from browser import Editor
from editors import editor_of
from frontends import NEWEST_FRONTEND, OLDEST_FRONTEND
from PIL import Image
from workflow_files import NAMES, api, workflow

from workbench.comfy_server import PACK_NAME, ComfyServer

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]
EVERYWHERE = "MOMA_EVERY_TEMPLATE" in os.environ
FEW = ("simple", "from_subject")
"""What also runs in the editors that this ComfyUI does not bring."""
ALIKE = ("auto_mask", "style_lora", "prompts", "strength_study")
"""As they open, the first two have the graph of new_context, the others run it several times."""
RUN = 900_000


class Fresh(NamedTuple):
    """A server with nothing but the pack, and an editor of it; `own`: the one that this ComfyUI brings."""

    server: ComfyServer
    editor: Editor
    own: bool


@pytest.fixture(scope="module", params=[None, OLDEST_FRONTEND, NEWEST_FRONTEND], ids=["pinned", "oldest", "newest"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    with editor_of(request.param, tmp_path_factory.mktemp("server")) as (server, editor):
        Image.new("RGB", (64, 64)).save(server.input / "example.png")  # as ComfyUI brings one
        yield Fresh(server, editor, request.param is None)


def content(prompt: dict[str, Any]) -> dict[str, Any]:
    """What of a prompt is run, and as what the user sees it."""
    return {name: (node["class_type"], node["inputs"], node["_meta"]["title"]) for name, node in prompt.items()}


def saved(server: ComfyServer) -> list[np.ndarray]:
    """The pictures that the last run saved."""
    (entry,) = json.loads(server.get("/history?max_items=1")).values()
    files = [file for shown in entry["outputs"].values() for file in shown.get("images", ())]
    kept = [server.view(file) for file in files if file["type"] == "output"]
    return [np.asarray(Image.open(io.BytesIO(picture))) for picture in kept]


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_as_it_was_meant_and_runs(fresh: Fresh, name: str) -> None:
    editor = fresh.editor
    editor.errors.clear()
    editor.open_template(PACK_NAME, name)
    assert editor.unknown_nodes() == [] and editor.overlaps() == []
    assert content(editor.prompt()) == content(api(name))
    if fresh.own and editor.has_app_view():
        with editor.app_view() as asked:
            assert asked == [text for _, text in workflow(name)["extra"]["linearData"]["inputs"]]
    if EVERYWHERE or name in FEW or (fresh.own and name not in ALIKE):
        if not EVERYWHERE:
            script = (
                "() => app.graph.nodes.forEach(n => n.widgets?.forEach(w => { if (w.name === 'steps') w.value = 1 }))"
            )
            editor.page.evaluate(script)
        editor.queue(RUN)
        pictures = saved(fresh.server)
        assert len(pictures) == sum(node["class_type"] == "SaveImage" for node in api(name).values())
        assert all(picture.std() > (20 if EVERYWHERE else 1) for picture in pictures)
    assert editor.errors == []
