"""The small world through the server, as who has nothing else runs it: every template that starts in it."""

import copy
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image
from safetensors import safe_open
from workflow_files import STARTS_SMALL, api, workflow

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, PromptRefusedError
from workbench.random_weights import adapter_file, llava_folder

pytestmark = pytest.mark.server
RELEASED = {
    "MoMALoad": {"model_name": "MoMA_llava_7b", "adapter_name": "MoMA_llava_7b/attn_adapters_projectors.th"},
    "MoMALoadMLLM": {"model_name": "MoMA_llava_7b"},
    "MoMALoadAdapter": {"adapter_name": "MoMA_llava_7b/attn_adapters_projectors.th"},
}
"""What the loaders choose for photographs."""

AS_NEW_CONTEXT = ("auto_mask", "style_lora")
"""What opens with a graph as new_context's, but for a strength and the saved subject."""

TEMPLATE: dict[str, Any] = json.loads((ROOT / "tests" / "api" / "try_it.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the pack and nothing else."""
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server")) as started:
        yield started


def pictures(server: ComfyServer, prompt: dict[str, Any]) -> dict[str, np.ndarray]:
    """What each Save Image of the prompt wrote, by its prefix."""
    run = server.run(prompt)
    found = {}
    for name, node in prompt.items():
        if node["class_type"] == "SaveImage":
            (file,) = run.files(name)
            found[node["inputs"]["filename_prefix"]] = np.asarray(Image.open(io.BytesIO(server.view(file)))).astype(int)
    return found


def test_the_template_runs_with_nothing_installed(server: ComfyServer) -> None:
    found = pictures(server, TEMPLATE)
    assert set(found) == {"MoMA/try_it_new_context", "MoMA/try_it_new_texture"}
    for picture in found.values():
        assert picture.shape == (128, 128, 3)
        # The moon: a black sky at the top, light ground without colour below.
        assert picture[:12].mean() < 60
        ground = picture[-8:]
        assert ground.mean() > 90
        assert np.abs(ground - ground.mean(axis=2, keepdims=True)).mean() < 14


def test_another_example_gives_another_subject(server: ComfyServer) -> None:
    prompt = copy.deepcopy(TEMPLATE)
    (mini,) = [node for node in prompt.values() if node["class_type"] == "MoMALoadMini"]
    mini["inputs"]["example"] = "checked bag"
    for node in prompt.values():
        if node["class_type"] == "MoMAExtractSubject":
            node["inputs"] |= {"subject": "bag", "prompt": node["inputs"]["prompt"].replace("cup", "bag")}
    first, second = (pictures(server, each)["MoMA/try_it_new_context"] for each in (TEMPLATE, prompt))
    assert np.abs(first - second).mean() > 5


def test_a_wrong_name_is_refused_before_anything_runs(server: ComfyServer) -> None:
    prompt = copy.deepcopy(TEMPLATE)
    (mini,) = [node for node in prompt.values() if node["class_type"] == "MoMALoadMini"]
    mini["inputs"]["ckpt_name"] = "v1-5.safetensors"
    with pytest.raises(PromptRefusedError, match=r"ckpt_name: there is no checkpoint 'v1-5\.safetensors'"):
        server.run(prompt)


def is_a_picture(picture: np.ndarray) -> bool:
    """Whether there is something on it, and neighbours are alike: those of noise differ as any two pixels do."""
    return picture.std() > 20 and np.abs(np.diff(picture, axis=1)).mean() < picture.std() / 2


def test_noise_and_one_colour_are_no_pictures() -> None:
    assert not is_a_picture(np.random.default_rng(1).integers(0, 256, (128, 128, 3)))
    assert not is_a_picture(np.full((128, 128, 3), 90))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in STARTS_SMALL if name not in AS_NEW_CONTEXT), "from_subject"])
def test_the_first_run_of_a_template_succeeds(server: ComfyServer, name: str) -> None:
    """As it opens, with no file installed and nothing changed; but the study, a run for each cell, has fewer steps."""
    found = pictures(server, few_steps(api(name), 6) if name == "strength_study" else api(name))
    assert found and all(map(is_a_picture, found.values()))
    sizes = {"hires_fix": (192, 192, 3), "two_subjects": (128, 256, 3)}
    if name != "strength_study":
        assert {picture.shape for picture in found.values()} == {sizes.get(name, (128, 128, 3))}
    if name in ("simple", "new_context"):
        (picture,) = found.values()
        sky, sand = picture[:12].mean(axis=(0, 1)), picture[-8:].mean(axis=(0, 1))
        assert sky[2] > sky[0] + 20 and sand[0] > sand[2] + 20  # blue above, yellow below: a beach


def test_the_subject_of_the_pack_is_what_its_weights_make(server: ComfyServer) -> None:
    """After a change of weights run scripts/example_subject.py."""
    server.run(few_steps(api("new_context")))
    made = max((server.output / "moma_subjects").glob("*.safetensors"))
    with (
        safe_open(made, "pt") as fresh,
        safe_open(ROOT / "weights" / "subjects" / "striped_cup.safetensors", "pt") as own,
    ):
        assert own.metadata() == fresh.metadata()
        for name in ("images", "masks"):
            assert torch.equal(own.get_tensor(name), fresh.get_tensor(name))
        assert torch.allclose(own.get_tensor("embedding"), fresh.get_tensor("embedding"), rtol=0.02, atol=0.02)


def few_steps(prompt: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    """The same graph in so many steps."""
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return prompt


def unmuted(server: ComfyServer, name: str) -> dict[str, Any]:
    """What the editor queues of a template when its muted nodes are turned on."""
    graph = workflow(name)
    for node in graph["nodes"]:
        node["mode"] = 0
    return dict(convert_ui_to_api(graph, server.object_info()))


@pytest.mark.parametrize("name", ["simple", "new_context"])
def test_a_picture_that_is_unmuted_takes_the_examples_place(server: ComfyServer, name: str) -> None:
    """To the bit what the example of that name gives."""
    server.add_input(ROOT / "weights" / "examples" / "two-coloured_car.png")
    own, same = few_steps(unmuted(server, name)), few_steps(api(name))
    (picture,) = [node for node in own.values() if node["class_type"] == "LoadImage"]
    picture["inputs"]["image"] = "two-coloured_car.png"
    (mini,) = [node for node in same.values() if node["class_type"] == "MoMALoadMini"]
    mini["inputs"]["example"] = "two-coloured car"
    (of_file,), (of_example,) = pictures(server, own).values(), pictures(server, same).values()
    assert np.array_equal(of_file, of_example)
    assert not np.array_equal(of_file, *pictures(server, few_steps(api(name))).values())
    assert "MoMA: ckpt_name in Load MoMA Checkpoint is a small checkpoint, which knows drawings" in server.log()


def test_a_picture_without_a_painted_mask_is_refused_with_a_way_out(server: ComfyServer) -> None:
    """As ComfyUI's own example.png is, which the muted node names."""
    Image.new("RGB", (64, 48), (90, 120, 30)).save(server.input / "example.png")
    with pytest.raises(ExecutionFailedError, match=r"^MoMAExtractSubject: mask is empty: no pixel is marked"):
        server.run(few_steps(unmuted(server, "new_context")))


@pytest.fixture(scope="module")
def with_released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server that has files as released beside the small ones, with random weights."""
    folder = tmp_path_factory.mktemp("models") / "MoMA_llava_7b"
    adapter_file(llava_folder(folder))
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("both"), {"moma/MoMA_llava_7b": folder}) as started:
        started.add_input(ROOT / "workbench" / "photo" / "photo_masked.png")
        yield started


def released(prompt: dict[str, Any], *pictures: bool) -> dict[str, Any]:
    """The prompt with the released files but for the checkpoint, and a photograph for some of its loaders."""
    prompt["photo"] = {"class_type": "LoadImage", "inputs": {"image": "photo_masked.png"}, "_meta": {"title": ""}}
    loaders = [node for node in prompt.values() if node["class_type"] == "MoMALoadMini"]
    for node, given in zip(loaders, pictures, strict=True):
        node["inputs"] |= {"image": ["photo", 0], "mask": ["photo", 1]} if given else {}
    for node in prompt.values():
        node["inputs"] |= RELEASED.get(node["class_type"], {})
    return few_steps(prompt)


@pytest.mark.parametrize(("name", "kind"), [("simple", "MoMAApplySubject"), ("new_context", "MoMAApplyAdapter")])
def test_the_released_files_with_the_small_checkpoint_are_refused(
    with_released: ComfyServer, name: str, kind: str
) -> None:
    with pytest.raises(ExecutionFailedError, match=r"Choose what belongs together: an SD1\.5 checkpoint") as failure:
        with_released.run(released(api(name), True))
    assert failure.value.node_type == kind


@pytest.mark.parametrize(
    ("name", "given", "left"), [("simple", (False,), "striped cup"), ("two_subjects", (True, False), "checked bag")]
)
def test_an_example_is_no_photograph(with_released: ComfyServer, name: str, given: tuple[bool, ...], left: str) -> None:
    """Of the picture that was left muted."""
    message = (
        rf"^MoMAExtractSubject: image is '{left}', the example of .* takes pictures of 512x512\. For photographs unmute"
    )
    with pytest.raises(ExecutionFailedError, match=message):
        with_released.run(released(api(name), *given))


@pytest.mark.parametrize("kind", ["MoMALoadMLLM", "MoMALoadAdapter"])
def test_one_released_file_with_a_small_one_is_refused(with_released: ComfyServer, kind: str) -> None:
    prompt = few_steps(api("new_context"))
    for node in prompt.values():
        if node["class_type"] == kind:
            node["inputs"] |= RELEASED[kind]
    with pytest.raises(
        ExecutionFailedError, match="they do not belong together. Choose both of MoMA's release"
    ) as failure:
        with_released.run(prompt)
    assert failure.value.node_type == "MoMAExtractSubject"
