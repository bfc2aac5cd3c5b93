"""The editor in a headless Chromium: workflows, blueprint, help pages, languages and errors as a person meets them."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import SETTINGS, WAIT, Editor, open_browser, open_editor
from workflow_files import API, BIREFNET, CHECKPOINT, CONTROLNET, LORA, STARTS_SMALL, api, photographs, workflow

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, PromptRefusedError
from workbench.random_weights import adapter_file, llava_folder

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]
SUBJECT = "cup_00001_.safetensors"
SAVED = "new_context_00001_.png"
RUNS, MUTED, BYPASSED = 0, 2, 4
"""Modes of a node."""
ADDED = ("LoadImage", "RemoveBackground", "ControlNetApplyAdvanced", "ControlNetLoader", "LoraLoader")
"""What opens off in one workflow or another."""
TERMS = ("model", "positive", "negative", "latent_image", "seed", "steps", "sampler_name", "scheduler", "denoise")
"""What the pack names as ComfyUI's own sampler does, in every language."""
LOCALIZED = """kind => Object.fromEntries(
    LiteGraph.createNode(kind).inputs.map(input => [input.name, input.localized_name ?? input.name]))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server where every file that a workflow names is listed; only MoMA's weights have content."""
    folder = tmp_path_factory.mktemp("models") / "MoMA_llava_7b"
    adapter_file(llava_folder(folder))
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server"), {"moma/MoMA_llava_7b": folder}) as started:
        for name in (CHECKPOINT, CONTROLNET, BIREFNET, LORA):
            (started.base / "models" / name).parent.mkdir(exist_ok=True)
            (started.base / "models" / name).touch()
        (started.output / "moma_subjects").mkdir()
        (started.output / "moma_subjects" / SUBJECT).touch()
        started.add_input(ROOT / "workbench" / "photo" / "photo_masked.png")
        (started.input / "photo_masked.png").rename(started.input / "example.png")
        started.post("/settings", SETTINGS)
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def editor(server: ComfyServer, browser: Any) -> Iterator[Editor]:
    with open_editor(browser, server.address) as opened:
        yield opened


def content(prompt: dict[str, Any]) -> dict[str, Any]:
    """What of a prompt is run."""
    return {name: (node["class_type"], node["inputs"]) for name, node in prompt.items()}


@pytest.mark.parametrize("name", STARTS_SMALL)
def test_what_is_off_is_wired_and_turned_on_by_two_keys(editor: Editor, name: str) -> None:
    """Ctrl+M on what is muted, Ctrl+B on what is bypassed: then all is as in the prompt for photographs."""
    editor.load(workflow(name), name)
    loaders = [node for node in editor.prompt().values() if node["class_type"] == "MoMALoadMini"]
    assert loaders and all(set(node["inputs"]) == {"ckpt_name", "example"} for node in loaders)
    for mode, keys in ((MUTED, "Control+m"), (BYPASSED, "Control+b")):
        editor.page.evaluate("mode => app.canvas.selectItems(app.graph.nodes.filter(n => n.mode === mode))", mode)
        editor.page.locator("#graph-canvas").focus()
        editor.page.keyboard.press(keys)
        editor.page.evaluate("() => app.canvas.deselectAll()")
    prompt, twin = editor.prompt(), photographs(name)
    assert set(twin) <= set(prompt)
    for node in prompt.values():
        if node["class_type"] == "MoMALoadMini":
            (picture, slot), (mask, _) = node["inputs"]["image"], node["inputs"]["mask"]
            assert prompt[picture]["class_type"] == "LoadImage" and slot == 0
            assert prompt[mask]["class_type"] == ("RemoveBackground" if name == "auto_mask" else "LoadImage")
    kinds = [
        sorted(node["class_type"] for node in graph.values() if node["class_type"] in ADDED) for graph in (prompt, twin)
    ]
    assert kinds[0] == kinds[1]


def test_a_workflow_of_before_an_input_keeps_its_default(editor: Editor) -> None:
    old = workflow("new_context")
    (node,) = [node for node in old["nodes"] if node["type"] == "MoMAExtractSubject"]
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] != "mask_threshold"]
    node["widgets_values"] = node["widgets_values"][:4]
    editor.load(old, "old")
    assert content(editor.prompt()) == content(api("new_context"))


def test_the_blueprint_is_offered_and_opens(server: ComfyServer, editor: Editor) -> None:
    (entry,) = [e for e in json.loads(server.get("/global_subgraphs")).values() if "MoMA" in e["info"]["node_pack"]]
    assert entry["name"] == "MoMA personalize"
    editor.errors.clear()
    editor.add_by_search(entry["name"])
    prompt = editor.prompt()
    committed = json.loads((API / "blueprint" / "personalize.json").read_text(encoding="utf-8"))
    outer = next(iter(prompt)).partition(":")[0]
    inside = json.loads(json.dumps(committed).replace('"1:', f'"{outer}:'))
    assert content(prompt) == content(inside)
    node_inputs = editor.page.evaluate("() => app.graph.nodes[0].inputs.map(i => i.name)")
    assert {"image", "mask", "subject", "prompt", "strength", "seed"} <= set(node_inputs)
    assert editor.errors == []


def test_a_search_that_the_editor_was_not_ready_for_is_made_again(editor: Editor) -> None:
    """Its first double-click is lost, as on a machine that is busy."""
    swallow = """() => {
        window.lost = 0
        const stop = event => { if (window.lost < 2) { event.stopImmediatePropagation(); window.lost += 1 } }
        window.addEventListener('pointerdown', stop, true)
    }"""
    editor.page.evaluate(swallow)
    editor.add_by_search("Apply MoMA Adapter")
    assert editor.page.evaluate("() => window.lost") == 2
    assert editor.page.evaluate("() => app.graph.nodes.map(node => node.type)") == ["MoMAApplyAdapter"]


def test_the_blueprint_has_its_widgets_and_keeps_them(editor: Editor) -> None:
    """Opened as a file, changed, saved and opened again."""
    (path,) = (ROOT / "subgraphs").glob("*.json")
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    (node,) = blueprint["nodes"]
    names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    values = dict(zip(names, node["widgets_values"], strict=True))
    editor.errors.clear()
    editor.load(blueprint, "blueprint")
    assert editor.widgets(node["type"]) == values
    script = "() => { app.graph.nodes[0].widgets.find(w => w.name === 'prompt').value = 'A cup in the snow.' }"
    editor.page.evaluate(script)
    editor.load(editor.saved(), "again")
    assert editor.widgets(node["type"]) == {**values, "prompt": "A cup in the snow."}
    (extract,) = [n for n in editor.prompt().values() if n["class_type"] == "MoMAExtractSubject"]
    assert (extract["inputs"]["subject"], extract["inputs"]["prompt"]) == ("cup", "A cup in the snow.")
    assert editor.errors == []


def test_the_app_view_shows_what_is_saved(editor: Editor) -> None:
    """Of a graph that saves what it loads, as the view does not know where a picture came from."""
    if not editor.has_app_view():
        pytest.skip("this editor has no app view of chosen inputs and outputs")
    graph = workflow("new_context")
    save, load = ({node["type"]: node for node in graph["nodes"]}[kind] for kind in ("SaveImage", "LoadImage"))
    (link,) = [link for link in graph["links"] if link[3] == save["id"]]
    link[1:3] = [load["id"], 0]
    for node in graph["nodes"]:
        node["mode"] = RUNS if node in (save, load) else MUTED
    editor.load(graph, "app")
    with editor.app_view():
        picture = editor.page.get_by_test_id("linear-center-panel").locator(f"img[src*='{SAVED}']").first
        assert picture.count() == 0
        editor.queue(WAIT)
        picture.wait_for(timeout=WAIT)


def test_a_help_page_opens_with_its_picture(server: ComfyServer, browser: Any) -> None:
    with open_editor(browser, server.address) as editor:
        editor.load(workflow("new_context"), "help")
        editor.open_help("MoMASelfAttnShortcut")
        picture = editor.page.locator("img[src*='MoMASelfAttnShortcut.png']").first
        picture.wait_for(timeout=WAIT)
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 200


def test_a_shortcut_added_by_hand_keeps_its_seed(editor: Editor) -> None:
    editor.load(workflow("new_context"), "seed")
    found = editor.page.evaluate(
        """() => {
            const node = LiteGraph.createNode('MoMASelfAttnShortcut')
            app.graph.add(node)
            const seed = node.widgets.find(widget => widget.name === 'seed')
            const before = seed.value
            const control = seed.linkedWidgets[0]
            control.beforeQueued?.()
            control.afterQueued?.()
            return [control.value, seed.value === before]
        }"""
    )
    assert found == ["fixed", True]


@pytest.mark.parametrize("locale", ["zh", "ja", "ko"])
def test_the_editor_speaks_the_users_language(server: ComfyServer, browser: Any, locale: str) -> None:
    server.post("/settings", {**SETTINGS, "Comfy.Locale": locale})
    try:
        with open_editor(browser, server.address) as editor:
            names = editor.page.evaluate(
                """() => {
                    const node = LiteGraph.createNode('MoMAExtractSubject')
                    return [node.title, ...node.inputs.map(i => i.localized_name ?? i.name)]
                }"""
            )
            texts = json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))
            assert names[0] == texts["MoMAExtractSubject"]["display_name"]
            assert {text["name"] for text in texts["MoMAExtractSubject"]["inputs"].values()} <= set(names)
            ours, theirs = (editor.page.evaluate(LOCALIZED, kind) for kind in ("MoMAStrengthStudy", "KSampler"))
            assert {name: ours[name] for name in TERMS} == {name: theirs[name] for name in TERMS}
            editor.load(workflow("new_context"), "help")
            editor.open_help("MoMASelfAttnShortcut")
            page = (ROOT / "web" / "docs" / "MoMASelfAttnShortcut" / f"{locale}.md").read_text(encoding="utf-8")
            sentence = page.split("\n\n")[1].replace("\n", " ")[:12]
            editor.page.get_by_text(sentence).first.wait_for(timeout=WAIT)
    finally:
        server.post("/settings", SETTINGS)


def test_an_error_says_the_same_in_the_editor_and_to_an_api_client(server: ComfyServer, editor: Editor) -> None:
    """A name that no file has: refused before anything runs."""
    bad = workflow("new_context")
    (node,) = [node for node in bad["nodes"] if node["type"] == "MoMALoadAdapter"]
    node["widgets_values"] = ["gone.th"]
    editor.load(bad, "bad")
    editor.page.evaluate("() => app.queuePrompt(0)")
    editor.page.wait_for_function("() => Object.keys(app.lastNodeErrors ?? {}).length", timeout=WAIT)
    shown = editor.page.evaluate("() => app.lastNodeErrors")
    prompt = api("new_context")
    prompt[str(node["id"])]["inputs"]["adapter_name"] = "gone.th"
    with pytest.raises(PromptRefusedError) as refusal:
        server.queue(prompt)
    told = refusal.value.node_errors[str(node["id"])]["errors"]
    assert [error["details"] for error in shown[str(node["id"])]["errors"]] == [error["details"] for error in told]
    assert "adapter_name: there is no adapter 'gone.th'. Searched:" in told[0]["details"]
    editor.close_dialogs()


def extraction_only(editor: Editor, subject: str, prompt: str, template: str = "{subject}. {prompt}") -> None:
    """The new_context workflow with these texts, down to the text that MoMA Text Encode gives."""
    shown = workflow("new_context")
    for node in shown["nodes"]:
        if node["type"] == "MoMAExtractSubject":
            node["widgets_values"][:2] = [subject, prompt]
        elif node["type"] == "MoMATextEncode":
            node["widgets_values"][1] = template
    editor.load(shown, "choices")
    editor.page.evaluate(
        """() => {
            const kinds = ['MoMALoadMini', 'MoMALoadMLLM', 'MoMALoadAdapter', 'MoMAExtractSubject', 'MoMATextEncode']
            app.graph.nodes.filter(node => !kinds.includes(node.type)).forEach(node => app.graph.remove(node))
            const encode = app.graph.nodes.find(node => node.type === 'MoMATextEncode')
            const preview = LiteGraph.createNode('PreviewAny')
            app.graph.add(preview)
            encode.connect(1, preview, 0)
        }"""
    )


def test_a_choice_is_made_once_for_a_run(server: ComfyServer, editor: Editor) -> None:
    """The editor passes it on as it is written; each run chooses, for word, prompt and encoded text alike."""
    extraction_only(editor, "{cup|mug}", "A {cup|mug} in {snow|rain}.")
    expected = {f"{thing}. A {thing} in {weather}." for thing in ("cup", "mug") for weather in ("snow", "rain")}
    editor.queue(120_000)
    (entry,) = json.loads(server.get("/history?max_items=1")).values()
    prompt = editor.prompt()
    (preview,) = [name for name, node in prompt.items() if node["class_type"] == "PreviewAny"]
    assert entry["outputs"][preview]["text"][0] in expected
    assert "A {cup|mug} in {snow|rain}." in [node["inputs"].get("prompt") for node in prompt.values()]
    texts = {server.run(prompt).outputs[preview]["text"][0] for _ in range(12)}  # as an API client would
    assert texts <= expected and len(texts) > 1


def test_a_missing_word_is_seen_in_app_mode(editor: Editor) -> None:
    """Where no node is shown, and so no text on one."""
    extraction_only(editor, "cup", "A beach.", "{prompt}")
    editor.page.evaluate("() => { app.extensionManager.workflow.activeWorkflow.activeMode = 'app' }")
    try:
        editor.page.wait_for_selector("[data-testid=linear-center-panel]", timeout=20_000)
        editor.queue(120_000)
        notice = editor.page.locator(".p-toast-message", has_text="the subject 'cup' is not among the words").first
        notice.wait_for(timeout=20_000)
        assert "Say the subject word in the prompt" in notice.inner_text()
    finally:
        editor.page.evaluate("() => { app.extensionManager.workflow.activeWorkflow.activeMode = 'graph' }")


def test_a_notice_that_is_shown_is_not_shown_again(editor: Editor) -> None:
    """Of a node that samples many times, each time with the same to say."""
    for text in ("MoMA: first", "MoMA: first", "MoMA: second"):
        editor.page.evaluate("text => app.api.dispatchCustomEvent('moma.notice', { text })", text)
    notices = editor.page.locator(".p-toast-message")
    notices.filter(has_text="MoMA: second").wait_for(timeout=WAIT)
    assert notices.filter(has_text="MoMA: first").count() == 1


def test_a_missing_file_is_offered_for_download(server: ComfyServer, browser: Any) -> None:
    """From the models' addresses in the workflow's nodes; that the sizes cannot be asked for is no error of ours."""
    (server.base / "models" / BIREFNET).unlink()
    try:
        with open_editor(browser, server.address) as editor:
            editor.errors.clear()
            turned_on = workflow("auto_mask")
            for node in turned_on["nodes"]:
                node["mode"] = RUNS
            editor.load(turned_on, "auto_mask")
            # ComfyUI 0.16's editor says it at once, later ones first show that something is missing.
            said = editor.page.get_by_text("Missing Models").first
            editor.page.get_by_text("View details").or_(said).first.click()
            said.wait_for(timeout=WAIT)
            shown = editor.page.evaluate("() => document.body.innerText").split("Missing Models")[1]
            assert re.search(
                r"birefnet\.safetensors\s+background_removal\s+Download"
                r"|background_removal / birefnet\.safetensors\s+Download",
                shown,
            )
            missing = shown.split("For photographs")[0]  # the note has a table of all files
            assert "attn_adapters_projectors" not in missing  # it is there
            assert editor.errors == []
    finally:
        (server.base / "models" / BIREFNET).touch()
