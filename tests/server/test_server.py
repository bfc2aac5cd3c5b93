"""Whole graphs through a real ComfyUI server's API, as a user's client queues them."""

import copy
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui_moma.moma_modules.download.release import FOLDER, MLLM_FILES, REPOSITORY
from hub_server import HubFile, HubServer
from PIL import Image
from safetensors.numpy import load_file
from workflow_files import STARTS_SMALL, photographs
from workflow_files import api as committed

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, Prompt, PromptRefusedError, Run
from workbench.random_weights import llava_folder
from workbench.small_world import ADAPTER, MLLM, in_small_world

pytestmark = pytest.mark.server
SNAPSHOT = ROOT / "tests" / "data" / "object_info.json"
FILE_LISTS = ("ckpt_name", "model_name", "adapter_name", "subject_name")


def api(name: str) -> Prompt:
    """A committed API prompt in the small world: two steps, a small wide picture, the test's photograph."""
    prompt = in_small_world(photographs(name) if name in STARTS_SMALL else committed(name), steps=2)
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = "photo_masked.png"
        elif node["class_type"] == "EmptyLatentImage":
            node["inputs"] |= {"width": 128, "height": 96}
    return prompt


def find(prompt: Prompt, kind: str) -> str:
    """The id of the one node of a class."""
    (name,) = [name for name, node in prompt.items() if node["class_type"] == kind]
    return name


def inputs(prompt: Prompt, kind: str) -> dict[str, Any]:
    """The inputs of the one node of a class."""
    return prompt[find(prompt, kind)]["inputs"]


def picture(server: ComfyServer, prompt: Prompt, run: Run, kind: str = "SaveImage") -> np.ndarray:
    """The pixels that an output node gave."""
    file = run.files(find(prompt, kind))[0]
    return np.asarray(Image.open(io.BytesIO(server.view(file))))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the pack and no models."""
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("bare")) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the photograph, and the small world's weights, which come with the pack."""
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server")) as started:
        started.add_input(ROOT / "workbench" / "photo" / "photo_masked.png")
        started.add_input(ROOT / "workbench" / "photo" / "photo.jpg")
        yield started


@pytest.fixture(scope="module")
def first(server: ComfyServer) -> tuple[Run, np.ndarray]:
    """The new-context workflow, run once."""
    run = server.run(api("new_context"))
    return run, picture(server, api("new_context"), run)


def contract(info: dict[str, Any]) -> dict[str, Any]:
    """What workflows rely on: ids, inputs with types and defaults, outputs; without the lists of files."""
    nodes = {}
    for name, node in sorted(info.items()):
        if name.startswith("MoMA"):
            groups = {kind: copy.deepcopy(node["input"].get(kind, {})) for kind in ("required", "optional")}
            for group in groups.values():
                for key, spec in group.items():
                    spec[1:] = [{k: v for k, v in spec[1].items() if k != "tooltip"}] if len(spec) > 1 else []
                    if key in FILE_LISTS:
                        spec[1].pop("options")
            nodes[name] = {"input": groups, "output": node["output"], "output_name": node["output_name"]}
            nodes[name] |= {key: node[key] for key in ("display_name", "category", "output_node")}
    return nodes


def test_the_pack_loads_and_keeps_its_contract(bare: ComfyServer) -> None:
    """Set UPDATE_SNAPSHOT=1 to accept a changed contract; say so in the changelog."""
    found = contract(bare.object_info())
    assert "IMPORT FAILED" not in bare.log() and "Traceback" not in bare.log()
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_nodes_can_be_found_and_explain_themselves(bare: ComfyServer) -> None:
    aliases: set[tuple[str, ...]] = set()
    for name, node in bare.object_info().items():
        if name.startswith("MoMA"):
            assert node["category"] == "MoMA" and node["description"]
            own = tuple(node["search_aliases"])
            assert own and own not in aliases, f"{name}: words of its own that people search it by"
            assert "MoMA" in name + node["display_name"] or "MoMA" in own
            aliases.add(own)
            assert all(node["output_tooltips"])
            specs = [spec for kind in ("required", "optional") for spec in node["input"].get(kind, {}).values()]
            assert all(spec[1]["tooltip"] for spec in specs)
            help_page = bare.get(f"/extensions/ComfyUI-MoMA/docs/{name}.md").decode()
            assert help_page.startswith(f"# {node['display_name']}")


def test_missing_files_are_named_before_anything_runs(bare: ComfyServer) -> None:
    with pytest.raises(PromptRefusedError) as refusal:
        bare.run(photographs("new_context"))
    message = str(refusal.value)
    folder = str(bare.base / "models" / "moma")
    for part in ("there is no MLLM 'MoMA_llava_7b'", "there is no adapter", folder, "huggingface.co/Kunpeng"):
        assert part in message
    saved = committed("from_subject")
    inputs(saved, "MoMALoadSubject")["subject_name"] = "cup_00001_.safetensors"
    with pytest.raises(PromptRefusedError, match=r"there is no saved subject 'cup_00001_\.safetensors'.*moma_subjects"):
        bare.run(saved)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("MoMALoadMini", "example"),
        ("MoMALoadMLLM", "model_name"),
        ("MoMALoadAdapter", "adapter_name"),
        ("MoMALoad", "adapter_name"),
        ("MoMALoadSubject", "subject_name"),
        ("MoMAConvertMLLM", "filename"),
    ],
)
def test_an_input_that_is_left_out_is_named(bare: ComfyServer, kind: str, name: str) -> None:
    prompt = {
        "1": {"class_type": kind, "inputs": {}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(PromptRefusedError) as refusal:
        bare.queue(prompt)
    errors = refusal.value.node_errors["1"]["errors"]
    assert name in [error["details"] for error in errors if error["type"] == "required_input_missing"]
    assert "positional" not in str(refusal.value)


def test_a_download_and_a_conversion_through_the_server(tmp_path: Path) -> None:
    """Progress in bytes is shown on the node; Cancel ends a transfer that takes long; then all is there."""
    source = llava_folder(tmp_path / "source")
    files = {name: HubFile((source / name).read_bytes()) for name in MLLM_FILES}
    files[MLLM_FILES[3]].held_at = 1
    convert = {"class_type": "MoMAConvertMLLM", "inputs": {"model_name": FOLDER, "precision": "int8", "filename": "x"}}
    load = {"class_type": "MoMALoadMLLM", "inputs": {"model_name": FOLDER, "precision": "auto", "download": True}}
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    with HubServer(REPOSITORY, files) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path / "hf"))
        with ComfyServer(comfyui_path(), tmp_path / "base") as server:
            asked: list[bool] = []

            def cancel(event: dict[str, Any]) -> None:
                if not asked and hub.sent(MLLM_FILES[3]):
                    asked.append(True)
                    server.interrupt()

            assert server.run({"1": load, "2": shown}, cancel).interrupted  # held, it never ends by itself
            files[MLLM_FILES[3]].held_at = None
            run = server.run({"1": load, "2": shown})
            total = sum(len(files[name].content) for name in MLLM_FILES[3:])  # the others came before Cancel
            assert ("1", total, total) in run.progress
            assert "x.safetensors" in server.run({"1": convert}).outputs["1"]["text"][0]
            info = server.object_info()["MoMALoadMLLM"]["input"]["required"]["model_name"]
            assert {FOLDER, "x.safetensors"} <= set(info[1]["options"])


@pytest.mark.slow
def test_the_new_context_workflow(server: ComfyServer, first: tuple[Run, np.ndarray]) -> None:
    prompt = api("new_context")
    run, image = first
    assert image.shape == (96, 128, 3) and image.std() > 1
    mask = picture(server, prompt, run, "MoMASubjectMask")
    assert mask.shape[:2] == (96, 128) and len(np.unique(mask)) > 10
    (saved,) = run.files(find(prompt, "MoMASaveSubject"), "moma_subjects")
    assert (server.output / saved["subfolder"] / saved["filename"]).stat().st_size > 4 * 128 * 128
    assert any(node == find(prompt, "MoMAExtractSubject") for node, _, _ in run.progress)


@pytest.mark.slow
def test_another_seed_does_not_run_the_mllm(server: ComfyServer, first: tuple[Run, np.ndarray]) -> None:
    """Right after `first`: ComfyUI keeps the results of the last prompt only."""
    prompt = api("new_context")
    inputs(prompt, "KSampler")["seed"] += 1
    run = server.run(prompt)
    again = {prompt[name]["class_type"] for name in run.executed}
    assert "KSampler" in again
    assert not again & {"MoMALoadMLLM", "MoMALoadAdapter", "MoMAExtractSubject", "MoMASelfAttnShortcut"}
    assert not np.array_equal(picture(server, prompt, run), first[1])


@pytest.mark.slow
def test_a_prompt_without_the_subject_warns_at_the_node(server: ComfyServer) -> None:
    prompt = api("new_context")
    inputs(prompt, "MoMATextEncode").update(prompt="A beach.", template="{prompt}")
    run = server.run(prompt)
    (warning,) = run.outputs[find(prompt, "MoMATextEncode")]["text"]
    assert "the subject 'cup' is not among the words of the prompt 'A beach.'" in warning
    assert picture(server, prompt, run).std() > 1


@pytest.mark.slow
def test_an_interrupted_run_can_be_run_again(server: ComfyServer) -> None:
    prompt = api("new_context")
    inputs(prompt, "KSampler")["seed"] = 77
    sampler = find(prompt, "KSampler")
    asked: list[bool] = []

    def interrupt(event: dict[str, Any]) -> None:
        # Once: a second request could reach the server after the run has ended, and stop the next one.
        if event["type"] == "progress" and event["data"]["node"] == sampler and not asked:
            asked.append(True)
            server.interrupt()

    assert server.run(prompt, interrupt).interrupted
    after = picture(server, prompt, server.run(prompt))
    server.post("/free", {"unload_models": True, "free_memory": True})
    # ComfyUI frees before the next run or after it, as it comes to it.
    fresh = [run for run in (server.run(prompt), server.run(prompt)) if sampler in run.executed]
    assert len(fresh) == 1
    assert np.array_equal(picture(server, prompt, fresh[0]), after)


@pytest.mark.slow
def test_the_saved_subject_gives_the_same_picture_without_the_mllm(
    server: ComfyServer, first: tuple[Run, np.ndarray]
) -> None:
    prompt = api("from_subject")
    inputs(prompt, "MoMALoadSubject")["subject_name"] = "cup_00001_.safetensors"
    run = server.run(prompt)
    assert np.array_equal(picture(server, prompt, run), first[1])


@pytest.mark.slow
def test_strength_and_weight_zero_are_the_unpatched_model(server: ComfyServer) -> None:
    off = api("new_context")
    inputs(off, "MoMASelfAttnShortcut")["strength"] = 0.0
    inputs(off, "MoMAApplyAdapter")["weight"] = 0.0
    patched = picture(server, off, server.run(off))
    plain = copy.deepcopy(off)
    inputs(plain, "KSampler")["model"] = [find(plain, "MoMALoadMini"), 0]
    del plain[find(plain, "MoMASubjectMask")]
    assert np.array_equal(patched, picture(server, plain, server.run(plain)))


@pytest.mark.slow
def test_the_new_texture_workflow_with_grey_and_unmasked_pictures(
    server: ComfyServer, first: tuple[Run, np.ndarray]
) -> None:
    prompt = api("new_texture")
    grey = server.input / "grey.png"
    Image.open(ROOT / "workbench" / "photo" / "photo.jpg").convert("L").save(grey)
    inputs(prompt, "LoadImage")["image"] = grey.name
    del inputs(prompt, "MoMAExtractSubject")["mask"]
    image = picture(server, prompt, server.run(prompt))
    assert image.std() > 1 and not np.array_equal(image, first[1])


@pytest.mark.slow
def test_a_batch_makes_one_subject_and_a_list_one_for_each_picture(server: ComfyServer) -> None:
    """One mask is used for all of them."""

    def saved(image: list[Any]) -> list[dict[str, np.ndarray]]:
        prompt = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "photo_masked.png"}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}},
            "4": {"class_type": "RebatchImages", "inputs": {"images": ["3", 0], "batch_size": 1}},
            "5": {"class_type": "MoMALoadMLLM", "inputs": {"model_name": MLLM, "precision": "auto"}},
            "6": {"class_type": "MoMALoadAdapter", "inputs": {"adapter_name": ADAPTER}},
            "7": {
                "class_type": "MoMAExtractSubject",
                "inputs": {"mllm": ["5", 0], "adapter": ["6", 0], "image": image, "mask": ["1", 1]}
                | {"subject": "cup", "prompt": "A cup.", "fit": "squash"},
            },
            "8": {"class_type": "MoMASaveSubject", "inputs": {"subject": ["7", 0], "filename_prefix": "lists"}},
        }
        run = server.run(prompt)
        texts = [text for node, text in run.texts if node == "7"]
        assert any("The one mask is used for each of the 2 pictures." in text for text in texts) == (image[0] == "3")
        return [
            load_file(server.output / file["subfolder"] / file["filename"]) for file in run.files("8", "moma_subjects")
        ]

    (batch,), (first, second) = saved(["3", 0]), saved(["4", 0])
    assert batch["images"].shape[0] == 2
    for i, alone in enumerate((first, second)):
        assert np.array_equal(alone["images"][0], batch["images"][i])
        assert np.array_equal(alone["masks"][0], batch["masks"][i]) and np.array_equal(first["masks"], alone["masks"])
    assert np.allclose((first["embedding"] + second["embedding"]) / 2, batch["embedding"], atol=1e-5)


@pytest.mark.slow
def test_an_empty_mask_is_refused_at_the_node(server: ComfyServer) -> None:
    prompt = api("new_context")
    inputs(prompt, "LoadImage")["image"] = "photo.jpg"
    with pytest.raises(ExecutionFailedError, match="^MoMAExtractSubject: mask is empty: no pixel is marked") as failure:
        server.run(prompt)
    assert failure.value.node_type == "MoMAExtractSubject"
