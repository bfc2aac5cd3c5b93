"""The small world through the server, as who has nothing else runs it."""

import copy
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, PromptRefusedError

pytestmark = pytest.mark.server

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
    with pytest.raises(PromptRefusedError, match=r"ckpt_name: there is no small checkpoint 'v1-5\.safetensors'"):
        server.run(prompt)
