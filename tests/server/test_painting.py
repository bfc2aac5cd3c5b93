"""The way of README's first picture: paint the subject in the mask editor, save, run, and look at what was taken."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import Editor
from editors import editor_of
from frontends import COLOUR_LOSING_FRONTEND, NEWEST_FRONTEND, OLDEST_FRONTEND
from PIL import Image
from safetensors.numpy import load_file

from workbench import ROOT
from workbench.comfy_server import ComfyServer
from workbench.random_weights import adapter_file, llava_folder

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]
PHOTO = ROOT / "workbench" / "photo" / "photo.jpg"
LEFT, TOP, RIGHT, BOTTOM = 0.3, 0.2, 0.7, 0.5
RUN = 300_000

GRAPH = """() => {
    const add = (type, values, x) => {
        const node = LiteGraph.createNode(type)
        node.pos = [x, 100]
        app.graph.add(node)
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find(w => w.name === name)
            widget.value = value
            widget.callback?.(value)
        }
        return node
    }
    app.graph.clear()
    const photo = add('LoadImage', {image: 'photo.png'}, 0)
    const mllm = add('MoMALoadMLLM', {}, 400), adapter = add('MoMALoadAdapter', {}, 800)
    const extract = add('MoMAExtractSubject', {subject: 'cup', prompt: 'A cup on a beach.'}, 1200)
    const save = add('MoMASaveSubject', {}, 1700)
    const into = name => extract.inputs.findIndex(input => input.name === name)
    mllm.connect(0, extract, into('mllm'))
    adapter.connect(0, extract, into('adapter'))
    photo.connect(0, extract, into('image'))
    photo.connect(1, extract, into('mask'))
    extract.connect(0, save, 0)
}"""
SECOND_PHOTO = """() => {
    const photo = LiteGraph.createNode('LoadImage')
    app.graph.add(photo)
    photo.widgets[0].value = 'photo.png'
    const extract = app.graph.nodes.find(node => node.type === 'MoMAExtractSubject')
    photo.connect(0, extract, extract.inputs.findIndex(input => input.name === 'image'))
}"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "MoMA_llava_7b"
    adapter_file(llava_folder(folder))
    return folder


@contextmanager
def painted(frontend: str | None, weights: Path, base: Path) -> Iterator[tuple[ComfyServer, Editor]]:
    """A server with this frontend (None: its own), and its editor after the photograph's mask was painted."""
    with editor_of(frontend, base, {"moma/MoMA_llava_7b": weights}) as (server, editor):
        Image.open(PHOTO).save(server.input / "photo.png")  # decoders of JPEG differ
        editor.page.evaluate(GRAPH)
        editor.page.wait_for_function("() => app.graph.nodes[0].imgs?.length", timeout=60_000)
        rows = np.linspace(TOP, BOTTOM, 15)
        corners = [(x, y) for i, y in enumerate(rows) for x in ((LEFT, RIGHT) if i % 2 else (RIGHT, LEFT))]
        editor.paint_mask("LoadImage", [corners])
        yield server, editor


def check_what_was_seen(server: ComfyServer) -> None:
    """The saved subject and the preview hold the photograph's pixels under what was painted, and nothing else."""
    photo = np.asarray(Image.open(PHOTO).convert("RGB").resize((512, 512), Image.Resampling.BILINEAR), np.int16)
    (file,) = (server.output / "moma_subjects").glob("*.safetensors")
    saved = load_file(file)
    image, mask = saved["images"][0], saved["masks"][0] > 0
    assert np.abs(image.astype(np.int16) - photo)[mask].max() <= 2
    y, x = np.mgrid[:512, :512] / 512
    brush = 0.03
    well_inside = (x > LEFT) & (x < RIGHT) & (y > TOP) & (y < BOTTOM)
    near = (x > LEFT - brush) & (x < RIGHT + brush) & (y > TOP - brush) & (y < BOTTOM + brush)
    assert mask[well_inside].mean() > 0.97 and not mask[~near].any()
    history = json.loads(server.get("/history"))
    (preview,) = [
        shown["images"][0]
        for run in history.values()
        for shown in run["outputs"].values()
        if "The mask covers" in str(shown.get("text"))
    ]
    seen = np.asarray(Image.open(io.BytesIO(server.view(preview))).convert("RGB"))[:, -512:]
    assert np.array_equal(seen, np.where(mask[..., None], image, 255))


@pytest.mark.parametrize("frontend", [None, OLDEST_FRONTEND, NEWEST_FRONTEND])
def test_a_painted_subject_is_what_the_language_model_sees(frontend: str | None, weights: Path, tmp_path: Path) -> None:
    with painted(frontend, weights, tmp_path) as (server, editor):
        editor.queue(RUN)
        check_what_was_seen(server)


def test_an_editor_that_loses_the_colours_is_noticed_and_the_advice_helps(weights: Path, tmp_path: Path) -> None:
    with painted(COLOUR_LOSING_FRONTEND, weights, tmp_path) as (server, editor):
        with pytest.raises(RuntimeError, match="^MoMAExtractSubject: image is black where its mask marks the subject"):
            editor.queue(RUN)
        assert not list((server.output / "moma_subjects").glob("*"))
        editor.close_dialogs()
        editor.page.evaluate(SECOND_PHOTO)
        editor.queue(RUN)
        check_what_was_seen(server)
