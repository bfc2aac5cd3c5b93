"""Bad files and names through a real server: an API client gets the node's own message, and the server lives on."""

import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.subject.file import save_subject
from safetensors.torch import save_file

from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, ExecutionFailedError, Prompt, PromptRefusedError
from workbench.scene import tiny_adapter, tiny_subject
from workbench.tiny_models import adapter_groups

pytestmark = pytest.mark.server
HARM = "harm.txt"


class Harm:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the pack, and files that are broken in different ways."""
    base = tmp_path_factory.mktemp("faults")
    models, subjects = base / "models" / "moma", base / "output" / "moma_subjects"
    models.mkdir(parents=True)
    subjects.mkdir(parents=True)
    torch.save({"projectors": Harm(base / HARM)}, models / "code.th")
    (models / "pickle.th").write_bytes(pickle.dumps({"projectors": Harm(base / HARM)}))
    torch.save(adapter_groups(embedding=48), models / "good.th")
    (models / "cut.th").write_bytes((models / "good.th").read_bytes()[:5000])
    torch.save({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, models / "lora.th")
    save_file({"projectors.proj.weight": torch.zeros(2, 2)}, models / "part.safetensors")
    (models / "header.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    (subjects / "page.safetensors").write_text("<html>404</html>", encoding="utf-8")
    save_file({"x": torch.zeros(1)}, subjects / "lora.safetensors")
    entries = {"format": "moma_subject", "version": "99"}
    save_file({"x": torch.zeros(1)}, subjects / "future.safetensors", entries)
    save_subject(tiny_subject(tiny_adapter(), size=512), subjects / "good.safetensors")
    with ComfyServer(comfyui_path(), base) as started:
        yield started


def load_adapter(name: str) -> Prompt:
    """An adapter that is loaded and used with a good subject, on no model."""
    return {
        "adapter": {"class_type": "MoMALoadAdapter", "inputs": {"adapter_name": name}},
        "subject": {"class_type": "MoMALoadSubject", "inputs": {"subject_name": "good.safetensors"}},
        "out": {"class_type": "PreviewAny", "inputs": {"source": ["adapter", 0]}},
    }


def load_subject(name: str) -> Prompt:
    return {
        "subject": {"class_type": "MoMALoadSubject", "inputs": {"subject_name": name}},
        "out": {"class_type": "PreviewAny", "inputs": {"source": ["subject", 1]}},
    }


def save(prefix: Any) -> Prompt:
    prompt = load_subject("good.safetensors")
    prompt["out"] = {"class_type": "MoMASaveSubject", "inputs": {"subject": ["subject", 0], "filename_prefix": prefix}}
    return prompt


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("code.th", r"code\.th was refused: .*holds code instead of weights\. Nothing in it was run"),
        ("pickle.th", r"pickle\.th was refused: .*holds code instead of weights"),
        ("cut.th", r"cut\.th \(\d+ bytes\) is not a readable PyTorch file \(truncated download\?\)"),
        ("lora.th", r"lora\.th is not a MoMA adapter: group 'projectors' is missing \(found: lora_unet_x"),
        ("part.safetensors", r"part\.safetensors is not a complete MoMA adapter: key 'projectors\.proj\.bias'"),
    ],
)
def test_a_bad_adapter(server: ComfyServer, name: str, message: str) -> None:
    with pytest.raises(ExecutionFailedError, match=rf"^MoMALoadAdapter: .*{message}"):
        server.run(load_adapter(name))
    assert not (server.base / HARM).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.safetensors", r"page\.safetensors is not a readable \.safetensors file"),
        ("lora.safetensors", r"lora\.safetensors is not a saved MoMA subject \(format None\)"),
        ("future.safetensors", "has format version '99'; this version of the pack reads 1 and 2. Update ComfyUI-MoMA"),
    ],
)
def test_a_bad_subject(server: ComfyServer, name: str, message: str) -> None:
    with pytest.raises(ExecutionFailedError, match=rf"^MoMALoadSubject: .*{message}"):
        server.run(load_subject(name))


@pytest.mark.parametrize("name", ["../secret.th", "/etc/passwd", "header.safetensors"])
def test_a_name_that_is_no_adapter_is_refused_before_anything_runs(server: ComfyServer, name: str) -> None:
    with pytest.raises(PromptRefusedError, match=rf"MoMALoadAdapter.*there is no adapter '{name}'.*Searched: "):
        server.run(load_adapter(name))


@pytest.mark.parametrize("prefix", ["../../x", "/tmp/x", "aux.safetensors", "a\0b", "x" * 300])
def test_a_bad_prefix_is_refused_before_anything_runs(server: ComfyServer, prefix: str) -> None:
    with pytest.raises(PromptRefusedError, match=r"MoMASaveSubject.*filename_prefix '.*Give a name such as"):
        server.run(save(prefix))


def test_names_may_come_from_other_nodes(server: ComfyServer) -> None:
    """A linked text is not known before the run; it is checked in the run."""
    linked = save(["text", 0])
    linked["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "linked/name"}}
    (saved,) = server.run(linked).files("out", "moma_subjects")
    assert (server.output / saved["subfolder"] / saved["filename"]).is_file()
    linked["text"]["inputs"]["value"] = "../linked"
    with pytest.raises(ExecutionFailedError, match=r"^MoMASaveSubject: filename_prefix '\.\./linked' leads out of its"):
        server.run(linked)


def test_the_server_lives_on_and_lists_the_good_files(server: ComfyServer) -> None:
    info = json.loads(server.get("/object_info/MoMALoadAdapter"))["MoMALoadAdapter"]
    names = info["input"]["required"]["adapter_name"][1]["options"]
    assert "good.th" in names and "header.safetensors" not in names
    run = server.run(load_subject("good.safetensors"))
    assert run.outputs["out"]["text"] == ["car"]
    server.run(load_adapter("good.th"))
    assert not (server.base / HARM).exists()
