"""Each of the pack's nodes bypassed and muted in each workflow: it runs without the node, or says what is missing."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import SETTINGS, Editor, open_browser, open_editor
from workflow_files import NAMES, api, workflow

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, Prompt, PromptRefusedError
from workbench.small_world import in_small_world

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]
MUTED, BYPASSED = 2, 4
"""Modes of a node."""
PASSED_BY = {"ControlNetApplyAdvanced": {0: "positive", 1: "negative"}, "LoraLoader": {0: "model", 1: "clip"}}
"""Nodes whose files the small world has not, and what each output then is."""
LOADERS = ("ControlNetLoader", "LoadBackgroundRemovalModel")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with nothing but the pack, a photograph and a subject saved by the small world."""
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server")) as started:
        started.add_input(ROOT / "workbench" / "photo" / "photo_masked.png")
        started.post("/settings", SETTINGS)
        saving = runnable(api("new_context"))
        started.run(saving)
        yield started


@pytest.fixture(scope="module")
def editor(server: ComfyServer) -> Iterator[Editor]:
    with open_browser() as browser, open_editor(browser, server.address) as opened:
        yield opened


def runnable(prompt: Prompt) -> Prompt:
    """The same graph in the small world and in one step, without the nodes whose files that has not."""
    changed = in_small_world(prompt, steps=1)
    gone = {name: node for name, node in changed.items() if node["class_type"] in PASSED_BY}
    for node in changed.values():
        inputs = node["inputs"]
        for key, value in list(inputs.items()):
            while isinstance(value, list) and value[0] in gone:
                by = gone[value[0]]
                value = by["inputs"].get(PASSED_BY[by["class_type"]][value[1]])
            inputs[key] = value
        node["inputs"] = {key: value for key, value in inputs.items() if value is not None}
        if node["class_type"] == "RemoveBackground":
            node |= {"class_type": "LoadImageMask", "inputs": {"image": "photo_masked.png", "channel": "alpha"}}
        elif node["class_type"] == "LoadImage":
            node["inputs"] = {"image": "photo_masked.png"}
    return {name: node for name, node in changed.items() if node["class_type"] not in (*PASSED_BY, *LOADERS)}


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
            small = runnable(prompt)
            if shape(small) not in ended:
                ended[shape(small)] = f"{name}: {label}", ending(server, small)
    said = dict(ended.values())
    failed = {label: text for label, text in said.items() if not text.startswith(("runs", "refused: "))}
    assert failed, "no workflow with both patches off has MoMA Subject Mask on"
    for text in failed.values():
        assert text.startswith("MoMASubjectMask: model has no MoMA on it")
        assert "bypassed or muted" in text and "MoMA Subject Mask too" in text
