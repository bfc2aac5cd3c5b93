"""What the client counts on, on the stand-in and on a real ComfyUI: the same tests, so that neither strays."""

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_scene_pack import add_tiny_scene_pack

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer
from workbench.random_weights import HIDDEN, llava_folder
from workbench.tiny_models import adapter_groups

pytestmark = pytest.mark.server
COLUMNS = ("image", "subject", "prompt")
PHOTO = ROOT / "workbench" / "photo" / "photo.jpg"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with small random models of every kind."""
    base = tmp_path_factory.mktemp("server")
    models = base / "models" / "moma"
    llava_folder(models / "MoMA_llava_7b")
    torch.save(adapter_groups(embedding=48, hidden=HIDDEN), models / "MoMA_llava_7b" / "attn_adapters_projectors.th")
    add_tiny_scene_pack(base)
    with ComfyServer(comfyui_path(), base) as started:
        yield started


@pytest.fixture(params=["stand-in", "ComfyUI"])
def server(request: pytest.FixtureRequest, place: Any) -> Any:
    """A client of either."""
    from moma_batch.server import Server

    if request.param == "stand-in":
        return Server(place.server()[0])
    return Server(request.getfixturevalue("real").address)


def graph(prefix: str, picture: str = "") -> dict[str, Any]:
    """A small picture that is saved."""
    made = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
    loaded = {"class_type": "LoadImage", "inputs": {"image": picture}}
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}}
    return {"1": loaded if picture else made, "2": saved}


def ended(server: Any, prompt_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := server.history(prompt_id):
            return dict(found)
        time.sleep(0.02)
    raise AssertionError("the prompt did not end")


def test_a_picture_carries_the_mark_of_its_row(server: Any) -> None:
    from moma_batch.pictures import check_picture, png_texts

    prompt_id, key = str(uuid.uuid4()), "0123456789abcdef" * 4
    server.queue(graph(f"moma_batch/x/{prompt_id}"), prompt_id, {"id": "é", "key": key})
    found = ended(server, prompt_id)
    assert found["status"]["status_str"] == "success" and not server.is_queued(prompt_id)
    (file,) = found["outputs"]["2"]["images"]
    assert file["filename"] == f"{prompt_id}_00001_.png" and file["type"] == "output"
    content = server.output(file)
    check_picture(content)
    assert json.loads(png_texts(content)["moma_batch"]) == {"id": "é", "key": key}
    server.forget(prompt_id)
    assert server.history(prompt_id) is None


def test_an_uploaded_picture_is_found_under_its_name(server: Any) -> None:
    name, prompt_id = f"moma_batch/ab/{uuid.uuid4().hex}.jpg", str(uuid.uuid4())
    for _ in range(2):  # over one that is there
        server.upload(name, PHOTO.read_bytes())
    server.queue(graph(f"y/{prompt_id}", name), prompt_id, {})
    assert ended(server, prompt_id)["outputs"]["2"]["images"]


def test_what_is_invalid_is_refused_with_the_words_of_the_editor(server: Any) -> None:
    from moma_batch.server import RefusedError

    for bad, words, node in (
        (graph("z", "none.jpg"), "Invalid image file", "LoadImage"),
        ({**graph("z"), "1": {"class_type": "NoSuchNode", "inputs": {}}}, "not found", ""),
    ):
        with pytest.raises(RefusedError, match=words) as refusal:
            server.queue(bad, str(uuid.uuid4()), {})
        assert refusal.value.node == node


def test_an_unknown_prompt_is_neither_queued_nor_in_the_history(server: Any) -> None:
    prompt_id = str(uuid.uuid4())
    assert server.history(prompt_id) is None and not server.is_queued(prompt_id)
    server.cancel(prompt_id)
    assert {"LoadImage", "SaveImage", "MoMAExtractSubject"} <= server.node_classes()
    assert server.versions()["comfyui"]


def test_a_server_that_is_not_there_is_gone(place: Any) -> None:
    from moma_batch.server import GoneError, Server

    url, process = place.server()
    process.kill()
    process.wait()
    with pytest.raises(GoneError, match=f"{url} cannot be reached"):
        Server(url).versions()
    for bad in ("127.0.0.1:8188", "file:///etc/passwd", "http://"):
        with pytest.raises(ValueError, match="is no address such as"):
            Server(bad)


def tiny_graph(folder: Path) -> Path:
    """The tool's own graph on the tiny models."""
    tiny = json.loads((ROOT / "moma_batch" / "default.json").read_text(encoding="utf-8"))
    tiny["1"] = {"class_type": "TinyModels", "inputs": {}}
    tiny["10"]["inputs"] |= {"width": 64, "height": 64}
    tiny["11"]["inputs"]["steps"] = 1
    path = folder / "tiny.json"
    path.write_text(json.dumps(tiny), encoding="utf-8")
    return path


def test_both_phases_give_the_pictures_of_one_and_do_not_repeat_the_photograph(real: ComfyServer, place: Any) -> None:
    data = PHOTO.parent
    masked(place)
    for name, source in (("turned.png", "photo.jpg"), ("mask.png", "mask.png")):
        Image.open(data / source).rotate(90).save(place.folder / name)
    columns = ("id", "image", "mask", "subject", "prompt", "seed", "strength", "set.KSampler.cfg", "note.why")
    scenes = [
        (photo, mask, f"A cup {where}.")
        for photo, mask in (("photo_masked.png", ""), ("turned.png", "mask.png"))
        for where in ("in snow", "on sand")
    ]
    table = place.table(
        [[f"r{i}", p, m, "cup", text, "1;2", "0.5", "2", "x"] for i, (p, m, text) in enumerate(scenes)], columns
    )
    words = ("run", str(table), "--server", real.address, "--workflow", str(tiny_graph(place.folder)))
    whole: dict[str, np.ndarray] = {}
    asked = real.log().count("got prompt")
    for phases in ("--one-phase", ""):
        place.out = place.folder / f"out{phases}"
        status, output = place.do(*words, *filter(None, [phases]))
        assert status == 0, output
        results = place.results()
        assert [found["status"] for found in results] == ["ok"] * 8
        made = {found["id"]: np.asarray(Image.open(place.out / found["picture"])) for found in results}
        assert len({picture.tobytes() for picture in made.values()}) == 8
        assert not whole or all(np.array_equal(whole[name], made[name]) for name in whole)
        whole = made
    assert real.log().count("got prompt") - asked == 8 + 2 + 8, "of each picture both prompts are encoded in one go"
    subjects = sorted((place.out / "subjects").rglob("*.*"), key=lambda path: path.stat().st_size)
    assert [path.suffix for path in subjects] == [".safetensors"] * 4 + [".pictures"] * 2
    assert all(path.stat().st_size < 10_000 for path in subjects[:4])
    log = real.log()
    assert place.do(*words)[0] == 0 and real.log().count("got prompt") == log.count("got prompt")


def masked(place: Any) -> str:
    """A photograph whose transparency is its mask."""
    name = "photo_masked.png"
    (place.folder / name).write_bytes((PHOTO.parent / name).read_bytes())
    return name


def subjects_of(out: Path) -> dict[str, tuple[tuple[str, str, str], torch.Tensor]]:
    """Word, prompt, picture and embedding of each saved subject, by the key that its file is called."""
    found = {}
    for path in (out / "subjects").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            about = file.metadata()
            said = (about["subject"], about["prompt"], about["pictures"])
            found[path.stem] = (said, file.get_tensor("embedding"))
    return found


def test_what_is_encoded_together_is_what_each_would_be_alone(real: ComfyServer, place: Any) -> None:
    graph = tiny_graph(place.folder)
    content = json.loads(graph.read_text(encoding="utf-8"))
    content["5"]["inputs"]["cache"], content["3"]["inputs"]["precision"] = False, "fp32"
    graph.write_text(json.dumps(content), encoding="utf-8")
    words = ("--server", real.address, "--workflow", str(graph), "--only", "encode")
    rows = [[masked(place), "cup" if i % 2 else "mug", f"A thing in place {i}."] for i in range(12)]
    asked = real.log().count("got prompt")
    status, output = place.do("run", str(place.table(rows, COLUMNS)), *words)
    assert status == 0, output
    assert real.log().count("got prompt") - asked == 2, "ten and two"
    together, place.out = subjects_of(place.out), place.folder / "alone"
    assert sorted(said[:2] for said, _ in together.values()) == sorted((word, text) for _, word, text in rows)
    for count in range(1, 4):
        assert place.do("run", str(place.table(rows[:count], COLUMNS)), *words)[0] == 0
    assert real.log().count("got prompt") - asked == 2 + 3
    alone = subjects_of(place.out)
    assert len(alone) == 3
    for key, (said, embedding) in alone.items():
        assert together[key][0] == said
        distances = {other: float((found - embedding).abs().max()) for other, (_, found) in together.items()}
        assert min(distances, key=lambda other: distances[other]) == key
        torch.testing.assert_close(together[key][1], embedding, atol=1e-4, rtol=1e-3)


def test_a_bad_word_names_itself_and_the_others_are_encoded(real: ComfyServer, place: Any) -> None:
    rows = [[f"r{i}", masked(place), word, f"A cup {i}."] for i, word in enumerate(("cup", "()", "mug"))]
    words = ("--server", real.address, "--workflow", str(tiny_graph(place.folder)))
    status, output = place.do("run", str(place.table(rows, ("id", *COLUMNS))), *words)
    assert status == 1 and "3 subjects of one picture were not encoded together, and are one by one:" in output
    found = {row["id"]: (row["status"], row["message"]) for row in place.results()}
    assert [state for state, _ in found.values()] == ["ok", "failed", "ok"]
    assert "subject is empty: give the word" in found["r1"][1] and "Entry" not in found["r1"][1]
