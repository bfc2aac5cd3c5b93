"""The MLLM in a real server: how often a queue brings it to its device, and by which of ComfyUI's flags it is read."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.mllm.convert import convert_mllm
from PIL import Image
from safetensors.torch import load_file

from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer, Event, ExecutionFailedError, Prompt, Run
from workbench.random_weights import HIDDEN, llava_folder
from workbench.tiny_models import adapter_groups

pytestmark = pytest.mark.server
CONVERTED = "one_file.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with --disable-mmap, an MLLM as a folder and as one file, a small adapter and a picture."""
    base = tmp_path_factory.mktemp("mllm")
    models = base / "models" / "moma"
    convert_mllm(llava_folder(models / "llava"), models / CONVERTED, "fp8", lambda *_: None)
    torch.save(adapter_groups(embedding=48, hidden=HIDDEN), models / "adapter.th")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(base / "noise.png")
    with ComfyServer(comfyui_path(), base / "server", {"moma": models}, ["--cpu", "--disable-mmap"]) as started:
        started.add_input(base / "noise.png")
        yield started


def joined(nodes: list[str]) -> dict[str, Any]:
    """A node that makes one list of what these give."""
    return {"class_type": "CreateList", "inputs": {f"inputs.input{i}": [node, 0] for i, node in enumerate(nodes)}}


def prompts(texts: list[str], extractions: int = 1, model: str = "llava", precision: str = "auto") -> Prompt:
    """A graph with nodes that each extract a subject for every text of one list."""
    graph: Prompt = {
        "mllm": {"class_type": "MoMALoadMLLM", "inputs": {"model_name": model, "precision": precision}},
        "adapter": {"class_type": "MoMALoadAdapter", "inputs": {"adapter_name": "adapter.th"}},
        "image": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
        "list": joined([f"part{i}" for i in range(0, len(texts), 10)]),
    }
    for i in range(0, len(texts), 10):  # Create List takes ten
        graph[f"part{i}"] = joined([f"text{j}" for j in range(i, min(i + 10, len(texts)))])
    for i, text in enumerate(texts):
        graph[f"text{i}"] = {"class_type": "PrimitiveString", "inputs": {"value": text}}
    for i in range(extractions):
        links = {"mllm": ["mllm", 0], "adapter": ["adapter", 0], "image": ["image", 0], "prompt": ["list", 0]}
        inputs = {**links, "subject": f"cup {i}", "fit": "squash", "cache": False}
        graph[f"extract{i}"] = {"class_type": "MoMAExtractSubject", "inputs": inputs}
        graph[f"save{i}"] = {
            "class_type": "MoMASaveSubject",
            "inputs": {"subject": [f"extract{i}", 0], "filename_prefix": f"cup{i}"},
        }
    return graph


def embeddings(server: ComfyServer, run: Run, node: str = "save0") -> list[torch.Tensor]:
    """Those of the subjects that a node saved."""
    found = run.files(node, "moma_subjects")
    return [load_file(server.output / file["subfolder"] / file["filename"])["embedding"] for file in found]


def loads(server: ComfyServer) -> int:
    """How often ComfyUI had to bring the MLLM to its device so far."""
    return server.log().count("Requested to load MllmModule")


def test_a_list_of_prompts_and_several_nodes_load_it_once(server: ComfyServer) -> None:
    before = loads(server)
    run = server.run(prompts(["A cup.", "A blue cup.", "A cup in the snow.", "Two cups."]))
    assert len(run.files("save0", "moma_subjects")) == 4
    assert loads(server) - before == 1
    run = server.run(prompts(["A cup in a park.", "A cup on the moon."], extractions=2))
    assert [len(run.files(f"save{i}", "moma_subjects")) for i in range(2)] == [2, 2]
    assert loads(server) - before == 1  # it is there since the first queue


def test_it_is_there_as_before_after_cancel_and_after_an_error(server: ComfyServer) -> None:
    server.run(prompts(["A cup."]))
    before = loads(server)

    def cancel(event: Event) -> None:
        if event["type"] == "progress" and event["data"]["node"] == "extract0":
            server.interrupt()

    many = [f"A cup, number {i}." for i in range(60)]
    assert server.run(prompts(many), cancel).interrupted
    refused = prompts(["A cup."])
    refused["extract0"]["inputs"]["subject"] = " "
    with pytest.raises(ExecutionFailedError, match="^MoMAExtractSubject: subject is empty: give the word"):
        server.run(refused)
    run = server.run(prompts(["A cup after all."]))
    assert len(run.files("save0", "moma_subjects")) == 1 and loads(server) == before


def test_a_list_gives_what_its_entries_give_alone(server: ComfyServer) -> None:
    texts = ["A cup by a lake.", "A cup on a roof.", "Three cups."]
    listed = embeddings(server, server.run(prompts(texts, precision="fp32")))
    for text, together in zip(texts, listed, strict=True):
        (alone,) = embeddings(server, server.run(prompts([text], precision="fp32")))
        assert torch.linalg.norm(alone - together) < 5e-5 * torch.linalg.norm(alone)


def test_a_bad_entry_is_named_and_the_others_are_there_the_next_time(server: ComfyServer) -> None:
    bad = prompts(["A cup of tea.", "A cup of cocoa.", "A cup of soup."])
    bad["words"] = joined(["word0", "word1", "word0"])
    bad |= {
        f"word{i}": {"class_type": "PrimitiveString", "inputs": {"value": word}} for i, word in enumerate(["cup", " "])
    }
    bad["extract0"]["inputs"] |= {"subject": ["words", 0], "cache": True}
    hidden_states = server.base / "user" / "__moma" / "hidden_states"
    before = set(hidden_states.glob("*"))
    with pytest.raises(ExecutionFailedError, match="^MoMAExtractSubject: Entry 2 of the list: subject is empty"):
        server.run(bad)
    assert len(set(hidden_states.iterdir()) - before) == 2
    bad["word1"]["inputs"]["value"] = "cup"
    assert len(server.run(bad).files("save0", "moma_subjects")) == 3
    assert len(set(hidden_states.iterdir()) - before) == 3


def test_two_servers_with_one_user_folder_encode_at_once(server: ComfyServer, tmp_path: Path) -> None:
    models = {"moma": server.base / "models" / "moma"}
    arguments = ["--cpu", "--user-directory", str(server.base / "user")]
    graph = prompts([f"A cup at {hour} o'clock." for hour in range(12)], precision="fp32")
    graph["extract0"]["inputs"]["cache"] = True
    with ComfyServer(comfyui_path(), tmp_path, models, arguments) as other, ThreadPoolExecutor() as threads:
        other.add_input(server.input / "noise.png")
        runs = [threads.submit(one.run, graph) for one in (server, other)]
        ours, theirs = (embeddings(one, run.result()) for one, run in zip((server, other), runs, strict=True))
        assert "could not keep" not in server.log() + other.log()
    assert len(ours) == len(theirs) == 12
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(ours, theirs, strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what a process maps")
def test_disable_mmap_is_honoured(server: ComfyServer) -> None:
    for model in ("llava", CONVERTED):
        server.run(prompts(["A cup without maps."], model=model))
        maps = Path(f"/proc/{server.process_id}/maps").read_text(encoding="utf-8")
        assert CONVERTED not in maps and "pytorch_model" not in maps and "libtorch" in maps
