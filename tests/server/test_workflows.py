"""Every example workflow: its files agree with one another and with the nodes, and it runs to the end."""

import functools
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from comfyui_source import cache_dir
from make_workflows import files
from PIL import Image
from workflow_files import (
    API,
    NAMES,
    NEWER_NODES,
    STARTS_SMALL,
    add_weights,
    api,
    known_to,
    photographs,
    small,
    workflow,
)

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, Prompt, PromptRefusedError, Run
from workbench.random_weights import adapter_file, llava_folder, sd15_checkpoint
from workbench.small_world import in_small_world

pytestmark = pytest.mark.server
DATA = ROOT / "tests" / "data"
Workflows = Callable[[str], tuple[Prompt, Run]]
OF_WHOLE_SD15 = ("pose",)
DOWNLOADS = {"auto_mask": {"LoadBackgroundRemovalModel"}, "pose": {"ControlNetLoader"}}
"""Workflows with a part that needs a download, and the nodes that tell the editor of it."""
ADDED = {
    "auto_mask": ("LoadBackgroundRemovalModel", "RemoveBackground"),
    "pose": ("ControlNetLoader", "ControlNetApplyAdvanced"),
    "style_lora": ("LoraLoader",),
}
"""What opens off beside the user's picture."""
RUNS, MUTED, BYPASSED = 0, 2, 4
"""Modes of a node."""
OUTPUTS = ("SaveImage", "MoMASubjectMask", "MoMASaveSubject")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with random weights for every workflow, and the photograph."""
    folder = tmp_path_factory.mktemp("models")
    mllm = folder / "MoMA_llava_7b"
    adapter_file(llava_folder(mllm))
    models = {
        "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": sd15_checkpoint(cache_dir()),
        "moma/MoMA_llava_7b": mllm,
    }
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server"), models) as started:
        started.add_input(ROOT / "workbench" / "photo" / "photo_masked.png")
        yield started


@pytest.fixture(scope="module")
def info(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


@pytest.fixture(scope="module")
def names(info: dict[str, Any]) -> list[str]:
    """The workflows that this ComfyUI can have."""
    return known_to(info)


@pytest.fixture(scope="module")
def weights(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    add_weights(server, cache_dir(), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def ran(server: ComfyServer, weights: None) -> Workflows:
    """Workflows by name, each run at most once; new_context is, which saves the subject that others load."""

    @functools.cache
    def run(name: str) -> tuple[Prompt, Run]:
        prompt = made_small(name)
        return prompt, server.run(prompt)

    run("new_context")
    return run


@pytest.fixture(scope="module")
def first(ran: Workflows) -> tuple[Prompt, Run]:
    return ran("new_context")


def pictures(server: ComfyServer, prompt: Prompt, run: Run, kind: str = "SaveImage") -> list[np.ndarray]:
    """What the nodes of a class gave."""
    nodes = [name for name, node in prompt.items() if node["class_type"] == kind]
    return [np.asarray(Image.open(io.BytesIO(server.view(file)))) for node in nodes for file in run.files(node)]


def made_small(name: str, steps: int = 1) -> Prompt:
    """A workflow with all its nodes in the small world, but where a file for the whole SD1.5 is loaded beside it."""
    prompt = photographs(name) if name in STARTS_SMALL else api(name)
    return small(prompt if name in OF_WHOLE_SD15 else in_small_world(prompt), steps=steps)


def inputs(prompt: Prompt, kind: str) -> dict[str, Any]:
    """The inputs of the one node of a class."""
    (node,) = [node for node in prompt.values() if node["class_type"] == kind]
    return node["inputs"]


def test_the_workflows_are_in_the_template_browser_with_pictures(server: ComfyServer) -> None:
    templates = json.loads(server.get("/workflow_templates"))["ComfyUI-MoMA"]
    assert sorted(templates) == NAMES and len(NAMES) == 12
    for name in NAMES:
        picture = Image.open(io.BytesIO(server.get(f"/api/workflow_templates/ComfyUI-MoMA/{name}.jpg")))
        assert picture.size == (768, 512)
        assert (ROOT / "workflows" / f"{name}.jpg").stat().st_size < 400_000


def test_the_files_are_what_the_descriptions_give(info: dict[str, Any], names: list[str]) -> None:
    """After a change run scripts/make_workflows.py."""
    if len(names) < len(NAMES):  # an old ComfyUI: the descriptions are for the newest one's nodes
        return
    for path, text in files(info).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run scripts/make_workflows.py"


def test_each_workflow_converts_to_its_api_prompt(info: dict[str, Any], names: list[str]) -> None:
    for name in names:
        converted = convert_ui_to_api(workflow(name), info)
        assert {k: (n["class_type"], n["inputs"]) for k, n in converted.items()} == {
            k: (n["class_type"], n["inputs"]) for k, n in api(name).items()
        }, name


def test_notes_packs_and_downloads_are_in_the_files() -> None:
    version = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split('\nversion = "')[1].split('"')[0]
    for name in NAMES:
        nodes = workflow(name)["nodes"]
        assert [node["type"] for node in nodes].count("MarkdownNote") == 1
        for node in nodes:
            properties = node["properties"]
            if node["type"].startswith("MoMA"):
                assert (properties["cnr_id"], properties["ver"]) == ("moma", version)
            for model in properties.get("models", []):
                assert model["name"] in node["widgets_values"] and model["url"].endswith(model["name"].split("/")[-1])
                # What the editor's list of files has: it calls others missing.
                assert model["name"].endswith(".safetensors")
        with_models = {node["type"] for node in nodes if node["properties"].get("models")}
        assert with_models == DOWNLOADS.get(name, set())
        assert all(node["mode"] != RUNS for node in nodes if node["properties"].get("models"))
        (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
        assert ("attn_adapters_projectors.th" in note) == (name != "try_it")  # what it takes for photographs


def test_what_starts_in_the_small_world_is_for_photographs_after_three_choices() -> None:
    """Its twin for photographs has other files, and the picture straight from Load Image; nothing else is lost."""
    assert sorted([*STARTS_SMALL, "try_it", "from_subject"]) == NAMES
    for name in STARTS_SMALL:
        nodes = {str(node["id"]): node for node in workflow(name)["nodes"]}
        off = {number: node for number, node in nodes.items() if node["mode"] != RUNS}
        keys = {MUTED: "Ctrl+M", BYPASSED: "Ctrl+B"}
        assert all(keys[node["mode"]] in node["title"] for node in off.values())
        assert {node["type"] for node in off.values()} == {"LoadImage", *ADDED.get(name, ())}
        own, twin = api(name), photographs(name)
        assert set(twin) - set(own) == set(off) and "moma_mini" not in str(twin) and "Ctrl" not in str(twin)
        gone = {own[number]["class_type"] for number in set(own) - set(twin)}
        assert gone <= {"MoMALoadMini"}
        assert {node["class_type"] for node in twin.values()} ^ {node["class_type"] for node in own.values()} == {
            *("MoMALoadMini", "CheckpointLoaderSimple", "LoadImage", *ADDED.get(name, ()))
        }


def test_the_workflows_pass_comfy_clis_validation(
    info: dict[str, Any], weights: None, server: ComfyServer, tmp_path: Path
) -> None:
    known = tmp_path / "object_info.json"
    fresh = server.object_info()
    known.write_text(json.dumps(fresh), encoding="utf-8")
    for name in known_to(fresh):
        if any(node["class_type"] == "MoMALoadSubject" for node in api(name).values()):
            continue  # its file is there only after a run
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(small(api(name))), encoding="utf-8")
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "workflow", "validate"]
        command += ["--workflow", str(path), "--input", str(known)]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        assert result.returncode == 0, f"{name}: {result.stdout}{result.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "strength_study"])
def test_each_workflow_runs_to_the_end(server: ComfyServer, ran: Workflows, name: str, names: list[str]) -> None:
    if name not in names:
        assert name in NEWER_NODES
        return
    prompt, run = ran(name)
    wanted = {node for node, content in prompt.items() if content["class_type"] in OUTPUTS}
    assert wanted <= set(run.outputs)
    found = pictures(server, prompt, run)
    assert len(found) == sum(node["class_type"] == "SaveImage" for node in prompt.values())
    assert all(picture.std() > 1 for picture in found)
    assert "lora key not loaded" not in server.log() and "missing background removal" not in server.log()
    if name == "hires_fix":
        assert found[0].shape == (192, 192, 3)
    if name == "prompts":
        assert len({picture.tobytes() for picture in found}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "strength"),
    [("pose", "ControlNetApplyAdvanced", "strength"), ("style_lora", "LoraLoader", "strength_model")],
)
def test_an_extra_changes_the_picture(server: ComfyServer, ran: Workflows, name: str, kind: str, strength: str) -> None:
    """The random ControlNet and LoRA are loaded and act."""
    without = made_small(name)
    inputs(without, kind)[strength] = 0.0
    assert not np.array_equal(pictures(server, *ran(name))[0], pictures(server, without, server.run(without))[0])


@pytest.mark.slow
def test_the_blueprint_gives_what_new_context_gives(server: ComfyServer, first: tuple[Prompt, Run]) -> None:
    prompt: Prompt = json.loads((API / "blueprint" / "personalize.json").read_text(encoding="utf-8"))
    prompt["2"] = {"class_type": "LoadImage", "inputs": {"image": "photo_masked.png"}, "_meta": {"title": ""}}
    (decode,) = [name for name, node in prompt.items() if node["class_type"] == "VAEDecode"]
    inputs(prompt, "MoMALoadMini").update(image=["2", 0], mask=["2", 1])
    prompt["3"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "b"}, "_meta": {}}
    found = pictures(server, prompt, server.run(small(in_small_world(prompt))))
    assert np.array_equal(found[0], pictures(server, *first)[0])


@pytest.mark.slow
def test_each_cell_of_the_study_is_the_picture_of_those_numbers(server: ComfyServer, first: tuple[Prompt, Run]) -> None:
    prompt = made_small("strength_study")
    (name,) = [name for name, node in prompt.items() if node["class_type"] == "MoMAStrengthStudy"]
    prompt[name]["inputs"] |= {"strengths": "0.4, 1.0, 0.0", "weights": "1.0"}
    save = {"class_type": "SaveImage", "inputs": {"images": [name, 1], "filename_prefix": "cells"}, "_meta": {}}
    prompt["cells"] = save
    sheet, low, high, off = pictures(server, prompt, server.run(prompt))
    assert np.array_equal(high, pictures(server, *first)[0])
    assert not np.array_equal(low, high) and not np.array_equal(low, off)
    assert sheet.shape[1] > 3 * 128 and sheet.shape[0] > 128


@pytest.mark.slow
def test_a_real_checkpoint_says_what_else_to_choose(server: ComfyServer) -> None:
    """In Load MoMA Checkpoint, with all else as the workflow opens: first the picture, then the adapter."""
    prompt = small(api("new_context"))
    inputs(prompt, "MoMALoadMini")["ckpt_name"] = "v1-5-pruned-emaonly-fp16.safetensors"
    with pytest.raises(
        ExecutionFailedError, match=r"^MoMAExtractSubject: image has no picture: .*Unmute the Load Image"
    ):
        server.run(prompt)
    prompt["photo"] = {"class_type": "LoadImage", "inputs": {"image": "photo_masked.png"}, "_meta": {"title": ""}}
    inputs(prompt, "MoMALoadMini").update(image=["photo", 0], mask=["photo", 1])
    with pytest.raises(ExecutionFailedError, match=r"^MoMAApplyAdapter: model is SD15 .* Choose what belongs together"):
        server.run(prompt)


def test_a_study_that_makes_no_sense_is_refused_before_it_runs(server: ComfyServer) -> None:
    prompt = small(api("strength_study"))
    (study,) = [node for node in prompt.values() if node["class_type"] == "MoMAStrengthStudy"]
    study["inputs"]["strengths"] = "0.4 1.0"
    with pytest.raises(PromptRefusedError, match=r"strengths: '0\.4 1\.0' is not a number\. Write numbers from 0 to 2"):
        server.queue(prompt)


@pytest.mark.slow
def test_the_mask_is_shown_live_and_changes_nothing(server: ComfyServer, first: tuple[Prompt, Run]) -> None:
    prompt = made_small("new_context", steps=2)
    plain = pictures(server, prompt, server.run(prompt))[0]
    (name,) = [name for name, node in prompt.items() if node["class_type"] == "MoMAApplyAdapter"]
    prompt[name]["inputs"]["show_mask"] = True
    run = server.run(prompt)
    assert np.array_equal(pictures(server, prompt, run)[0], plain)
    shown = [picture for node, picture in run.previews if node == name]
    assert shown and Image.open(io.BytesIO(shown[0])).size == (512, 512)
    texts = [text for _, text in run.texts]
    assert any("MoMA looks at the reference: cup" in text for text in texts)
    assert any("[cup]" in text for _, text in first[1].texts)


@pytest.mark.slow
def test_the_reference_is_shown_as_the_mllm_saw_it(server: ComfyServer, first: tuple[Prompt, Run]) -> None:
    (seen,) = pictures(server, *first, "MoMAExtractSubject")
    assert seen.shape == (128, 264, 3)
    assert (seen == np.array([255, 0, 200])).all(axis=2).sum() > 100
    texts = [out["text"][0] for out in first[1].outputs.values() if "text" in out]
    assert any(text.startswith("photo of a [cup]. a [cup] on a beach.") for text in texts)
    assert any(
        re.match(r"auto: weights in (fp16|bf16, cast once from fp16)\b.*, computing in ", text) for text in texts
    )


@pytest.mark.slow
def test_no_run_brings_the_language_model_twice(server: ComfyServer, ran: Workflows) -> None:
    """With two extractions in one graph, and the sampling after them."""
    prompt, _ = ran("two_subjects")
    assert [node["class_type"] for node in prompt.values()].count("MoMAExtractSubject") == 2
    runs = server.log().split("got prompt")[1:]
    assert max(run.count("Requested to load MllmModule") for run in runs) == 1
