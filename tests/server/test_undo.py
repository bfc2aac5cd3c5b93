"""Each of the pack's nodes bypassed and muted in each workflow: it runs without the node, or says what is missing."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import SETTINGS, Editor, open_browser, open_editor
from workflow_files import NAMES, workflow

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, Prompt, PromptRefusedError

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]
MUTED, BYPASSED = 2, 4
"""Modes of a node."""
SMALL_WORLD = {
    "CheckpointLoaderSimple": ("MoMALoadMini", {"ckpt_name": "moma_mini.safetensors", "example": "striped cup"}),
    "MoMALoadMLLM": ("MoMALoadMLLM", {"model_name": "moma_mini_llava"}),
    "MoMALoadAdapter": ("MoMALoadAdapter", {"adapter_name": "moma_mini_adapter.safetensors"}),
    "MoMALoad": ("MoMALoad", {"model_name": "moma_mini_llava", "adapter_name": "moma_mini_adapter.safetensors"}),
    "MoMALoadSubject": ("MoMALoadSubject", {"subject_name": "cup_00001_.safetensors"}),
}
"""What runs in seconds instead of the files that the workflows name: nodes with the same outputs in the same places."""
PASSED_BY = {"ControlNetApplyAdvanced": {0: "positive", 1: "negative"}, "LoraLoader": {0: "model", 1: "clip"}}
"""Nodes whose files the small world has not, and what each output then is."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with nothing but the pack, a photograph and a subject saved by the small world."""
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server")) as started:
        started.add_input(ROOT / "workbench" / "photo" / "photo_masked.png")
        started.post("/settings", SETTINGS)
        saving = in_the_small_world(json.loads((ROOT / "tests" / "api" / "new_context.json").read_text("utf-8")))
        started.run(saving)
        yield started


@pytest.fixture(scope="module")
def editor(server: ComfyServer) -> Iterator[Editor]:
    with open_browser() as browser, open_editor(browser, server.address) as opened:
        yield opened


def in_the_small_world(prompt: Prompt) -> Prompt:
    """The same graph with models that come with the pack, in one step."""
    gone = {name: node for name, node in prompt.items() if node["class_type"] in PASSED_BY}
    made: Prompt = {}
    for name, node in prompt.items():
        if node["class_type"] in (*PASSED_BY, "ControlNetLoader"):
            continue
        kind, own = SMALL_WORLD.get(node["class_type"], (node["class_type"], {}))
        inputs = {} if node["class_type"] == "CheckpointLoaderSimple" else dict(node["inputs"])
        for key, value in inputs.items():
            while isinstance(value, list) and value[0] in gone:
                by = gone[value[0]]
                value = by["inputs"].get(PASSED_BY[by["class_type"]][value[1]])
            inputs[key] = value
        inputs = {key: value for key, value in inputs.items() if value is not None} | own
        if kind == "RemoveBackground":
            kind, inputs = "LoadImageMask", {"image": "photo_masked.png", "channel": "alpha"}
        elif kind == "LoadImage":
            inputs = {"image": "photo_masked.png"}
        elif kind == "EmptyLatentImage":
            inputs |= {"width": 128, "height": 128}
        elif "steps" in inputs:
            inputs["steps"] = 1
        if kind != "LoadBackgroundRemovalModel":
            made[name] = {"class_type": kind, "inputs": inputs}
    return made


def as_queued(editor: Editor, name: str) -> dict[str, Prompt]:
    """What the editor queues of a workflow with each of our nodes off, and with all patches off, by what is off."""
    editor.load(workflow(name), name)
    script = """async ([muted, bypassed]) => {
        const made = {}, all = app.graph.nodes.filter(node => node.type.startsWith('MoMA'))
        const off = async (label, nodes, mode) => {
            const before = nodes.map(node => node.mode)
            nodes.forEach(node => { node.mode = mode })
            made[label] = (await app.graphToPrompt()).output
            nodes.forEach((node, i) => { node.mode = before[i] })
        }
        for (const node of all) {
            await off(`bypassed ${node.type} ${node.id}`, [node], bypassed)
            await off(`muted ${node.type} ${node.id}`, [node], muted)
        }
        const patches = all.filter(node => ['MoMAApplyAdapter', 'MoMASelfAttnShortcut'].includes(node.type))
        if (patches.length) await off('bypassed patches', patches, bypassed)
        return made
    }"""
    return dict(editor.page.evaluate(script, [MUTED, BYPASSED]))


def shape(prompt: Prompt) -> str:
    """A graph by its classes and links: two of one shape end alike."""

    def seen(name: str) -> Any:
        node = prompt.get(name, {"class_type": None, "inputs": {}})
        links = {key: value for key, value in node["inputs"].items() if isinstance(value, list)}
        return [node["class_type"], sorted((key, seen(value[0]), value[1]) for key, value in links.items())]

    return json.dumps(sorted(json.dumps(seen(name)) for name in prompt))


def ending(server: ComfyServer, prompt: Prompt) -> str:
    """`runs`, or what the user reads; a refusal must name an input that is not connected."""
    try:
        server.run(prompt)
    except PromptRefusedError as refusal:
        for node in refusal.node_errors.values():
            for error in node["errors"]:
                assert error["type"] == "required_input_missing" and error["details"], refusal
        return f"refused: {refusal}"
    except ExecutionFailedError as error:
        return str(error)
    return "runs"


def test_a_workflow_with_a_node_off_runs_or_says_what_is_missing(server: ComfyServer, editor: Editor) -> None:
    ended: dict[str, tuple[str, str]] = {}
    for name in NAMES:
        for label, prompt in as_queued(editor, name).items():
            small = in_the_small_world(prompt)
            if shape(small) not in ended:
                ended[shape(small)] = f"{name}: {label}", ending(server, small)
    said = dict(ended.values())
    failed = {label: text for label, text in said.items() if not text.startswith(("runs", "refused: "))}
    assert failed, "no workflow with both patches off has MoMA Subject Mask on"
    for text in failed.values():
        assert text.startswith("MoMASubjectMask: model has no MoMA on it")
        assert "bypassed or muted" in text and "MoMA Subject Mask too" in text
