"""Downloads from a hub: what is fetched, checked, resumed, refused, cancelled and asked of whom."""

import hashlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.download.client import WORKER, fetch, start_options
from comfyui_moma.moma_modules.download.release import ADAPTER_FILE, ADAPTER_NAME, FOLDER, MLLM_FILES, REPOSITORY
from comfyui_moma.moma_modules.host.folders import MODELS
from comfyui_moma.moma_modules.mllm.loading import download_mllm
from comfyui_moma.nodes.loaders import LoadAdapter, LoadMllm
from hub_server import COMMIT, HubFile, HubServer
from safetensors.torch import save_file

from workbench import ROOT
from workbench.random_weights import adapter_file, llava_folder

pytestmark = pytest.mark.newest

BIG = MLLM_FILES[3]
PIECE = 10 << 20
CONTENT = hashlib.shake_256(b"weights").digest(600_000)


def ignore(done: int, total: int, text: str) -> None:
    """A report that nobody looks at."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the released repository, made small, that huggingface_hub talks to."""
    small = {name: HubFile(name.encode(), large=False) for name in (*MLLM_FILES[:1], MLLM_FILES[2])}
    large = {
        name: HubFile(CONTENT + name.encode()) for name in (MLLM_FILES[1], *MLLM_FILES[3:], ADAPTER_FILE, "other.bin")
    }
    with HubServer(REPOSITORY, small | large) as server:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
        yield server


@pytest.fixture
def long(hub: HubServer) -> HubFile:
    """The first shard, made so long that huggingface_hub writes it piece by piece (of 10 MiB)."""
    hub.files[BIG].content = random.Random(0).randbytes(25_000_000)
    return hub.files[BIG]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "moma" / FOLDER


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_just_the_needed_files_are_fetched_and_only_once(hub: HubServer, long: HubFile, folder: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    long.held_at = PIECE + PIECE // 2

    def note(done: int, total: int, text: str) -> None:
        seen.append((done, total, text))
        if text == BIG and done > PIECE:
            long.held_at = None

    fetch(folder, list(MLLM_FILES), note)
    assert names(folder) == set(MLLM_FILES)
    assert all((folder / name).read_bytes() == hub.files[name].content for name in MLLM_FILES)
    assert not any("other.bin" in request.path or ADAPTER_FILE in request.path for request in hub.requests)
    assert all(
        COMMIT in request.path for request in hub.requests if request.method == "GET" and "resolve" in request.path
    )
    total = sum(len(hub.files[name].content) for name in MLLM_FILES)
    assert seen[-1] == (total, total, "Done")
    assert any(text == BIG and PIECE < done < total for done, _, text in seen)
    asked = len(hub.requests)
    fetch(folder, list(MLLM_FILES), ignore)
    assert len(hub.requests) == asked


def test_a_broken_connection_is_taken_up_where_it_broke(hub: HubServer, long: HubFile, folder: Path) -> None:
    long.breaks = 1
    fetch(folder, [BIG], ignore)
    assert (folder / BIG).read_bytes() == long.content and names(folder) == {BIG}
    assert hub.sent(f"store/{BIG}") == [0, PIECE]


def test_cancel_keeps_what_has_arrived_and_the_next_try_goes_on(hub: HubServer, long: HubFile, folder: Path) -> None:
    long.held_at = PIECE + PIECE // 2

    def cancel(done: int, total: int, text: str) -> None:
        if done:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fetch(folder, [BIG], cancel)
    long.held_at = None
    assert not (folder / BIG).exists()
    fetch(folder, [BIG], ignore)
    assert (folder / BIG).read_bytes() == long.content and names(folder) == {BIG}
    first, again = hub.sent(f"store/{BIG}")
    assert first == 0 < again <= 2 * PIECE


def test_a_stalled_hub_can_be_cancelled(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although nothing arrives, and the connection does not time out: that it ends at all is what is tested."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1000000")
    hub.files[BIG].held_at = 1  # a little, then silence

    def cancel(done: int, total: int, text: str) -> None:
        if hub.sent(f"store/{BIG}"):
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fetch(folder, [BIG], cancel)


@pytest.mark.parametrize("large", [True, False])
def test_a_damaged_file_is_refused_and_removed(hub: HubServer, folder: Path, large: bool) -> None:
    hub.files[BIG] = HubFile(b"x" + CONTENT[1:], stated=CONTENT, large=large)
    with pytest.raises(RuntimeError) as refusal:
        fetch(folder, [BIG], ignore)
    for part in (BIG, "arrived damaged and was removed", "Queue again", "huggingface.co", str(folder)):
        assert part in str(refusal.value)
    assert names(folder) <= {f".{BIG}.lock"}


@pytest.mark.parametrize("wrong", [CONTENT[:-1], CONTENT + b"y"])
def test_a_file_of_another_size_is_refused(hub: HubServer, folder: Path, wrong: bytes) -> None:
    hub.files[BIG].content, hub.files[BIG].stated = wrong, CONTENT
    with pytest.raises(RuntimeError, match=f"should be of size {len(CONTENT)} but has size {len(wrong)}"):
        fetch(folder, [BIG], ignore)
    assert not (folder / BIG).exists()
    hub.files[BIG].content = CONTENT
    fetch(folder, [BIG], ignore)
    assert (folder / BIG).read_bytes() == CONTENT


def test_a_private_repository_needs_the_right_token(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "right"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(RuntimeError, match=r"^download: The hub refused access \(401\)\. Check HF_TOKEN"):
        fetch(folder, [BIG], ignore)
    monkeypatch.setenv("HF_TOKEN", "right")
    fetch(folder, [BIG], ignore)
    assert {request.token for request in hub.requests if "/resolve/" in request.path} == {"wrong", "right"}
    assert {request.token for request in hub.requests if "/store/" in request.path} == {None}


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, r"refused access \(403\)"), (404, r"does not have it \(404\)"), (500, "answered with status 500")],
)
def test_what_the_hub_refuses_is_said(hub: HubServer, folder: Path, status: int, message: str) -> None:
    hub.files[BIG].status = status
    with pytest.raises(RuntimeError, match=rf"^download: .*{message}.*Queue again to go on, or get the files by hand"):
        fetch(folder, [BIG], ignore)


def test_offline_mode_and_absent_hubs_are_said(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set, so nothing is fetched"):
        fetch(folder, [BIG], ignore)
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="The connection failed"):
        fetch(folder, [BIG], ignore)


def test_a_small_disk_is_told_before_anything_is_fetched(hub: HubServer, small_disk: Path) -> None:
    hub.files[BIG].content *= 4
    with pytest.raises(
        RuntimeError, match=r"0\.00 GB are still to be fetched, but the disk of .* has 0\.00 GB free\. Make"
    ):
        fetch(small_disk / FOLDER, [BIG], ignore)
    assert not hub.sent(f"store/{BIG}")


def test_a_disk_that_fills_up_is_told_and_what_is_there_is_kept(hub: HubServer, small_disk: Path) -> None:
    hub.files[BIG].held_at = 1
    filler = small_disk / "filler"

    def fill(done: int, total: int, text: str) -> None:
        if text == BIG and not filler.exists():
            filler.write_bytes(b"0" * 700_000)
            hub.files[BIG].held_at = None

    with pytest.raises(
        RuntimeError, match=r"^download: The disk of .*MoMA_llava_7b is full\. Make room; what is there is"
    ):
        fetch(small_disk / FOLDER, [BIG], fill)
    filler.unlink()
    fetch(small_disk / FOLDER, [BIG], ignore)
    assert (small_disk / FOLDER / BIG).read_bytes() == hub.files[BIG].content


def test_two_processes_fetch_a_file_once(hub: HubServer, folder: Path) -> None:
    hub.files[BIG].held_at = 1
    failures: list[BaseException] = []
    texts = ["", ""]

    def run(number: int) -> None:
        def note(done: int, total: int, text: str) -> None:
            texts[number] = text
            if set(texts) == {BIG, f"Waiting for another process that fetches {BIG}"}:
                hub.files[BIG].held_at = None

        try:
            fetch(folder, [BIG], note)
        except RuntimeError as error:
            failures.append(error)
            hub.files[BIG].held_at = None

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and names(folder) == {BIG}
    assert (folder / BIG).read_bytes() == hub.files[BIG].content
    assert hub.sent(f"store/{BIG}") == [0]


def test_windows_opens_no_console_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing that window would end the download."""
    monkeypatch.setenv("HF_HOME", "x")
    assert start_options("win32")["creationflags"] & 0x08000000  # CREATE_NO_WINDOW
    assert not start_options("win32")["creationflags"] & 0x00000018  # DETACHED_PROCESS, CREATE_NEW_CONSOLE
    if sys.platform == "win32":
        assert start_options("win32")["creationflags"] == subprocess.CREATE_NO_WINDOW
    assert "start_new_session" not in start_options("win32")
    for platform in ("linux", "darwin"):
        assert start_options(platform)["start_new_session"] and "creationflags" not in start_options(platform)
    assert all(start_options(platform)["env"]["HF_HOME"] == "x" for platform in ("win32", "linux"))


def test_it_runs_in_comfyuis_python_without_a_shell() -> None:
    """With the switch of the portable ComfyUI, which leaves the user's own packages out."""
    code = "import sys; from moma_modules.download.client import worker_command; print(worker_command('{}'))"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    for switches in ([], ["-s"]):
        command = [sys.executable, *switches, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, encoding="utf-8", check=True)
        assert done.stdout.strip() == repr([sys.executable, *switches, str(WORKER), "{}"])


def test_only_the_download_starts_a_process() -> None:
    """What scanners of node packs look for, in one known place."""
    starts = re.compile(
        r"subprocess|multiprocessing|os\.(?:system|popen|spawn|exec|startfile)|(?<![.\w])(?:eval|exec)\("
    )
    files = [*(ROOT / "moma_modules").rglob("*.py"), *(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py"]
    assert [path.name for path in files if starts.search(path.read_text("utf-8"))] == ["client.py"]


def test_the_worker_ends_with_the_process_that_started_it(hub: HubServer, folder: Path) -> None:
    hub.files[BIG].held_at = 1
    code = (
        "import subprocess, sys, json, os, time\n"
        f"job = json.dumps({{'repository': {REPOSITORY!r}, 'folder': {str(folder)!r}, 'files': [{BIG!r}]}})\n"
        f"p = subprocess.Popen([sys.executable, {str(WORKER)!r}, job], stdin=-1, stdout=-1)\n"
        "p.stdout.readline(); print(p.pid, flush=True); os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    while _runs(int(done.stdout)):  # if it did not end, neither would this
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One empty folder of models."""
    root = tmp_path / "moma"
    root.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, MODELS, ([str(root)], {".th", ".safetensors"}))
    folder_paths.filename_list_cache.pop(MODELS, None)
    return root


def test_a_new_user_can_choose_the_release_and_have_it_fetched(hub: HubServer, roots: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    adapter_file(llava_folder(source))
    for name in (*MLLM_FILES, ADAPTER_FILE):
        hub.files[name].content = (source / name).read_bytes()
    assert FOLDER in combo(LoadMllm, "model_name") and ADAPTER_NAME in combo(LoadAdapter, "adapter_name")
    for refused in (LoadMllm.validate_inputs(FOLDER, False), LoadAdapter.validate_inputs(ADAPTER_NAME, False)):
        assert "turn on download, an advanced input" in str(refused) and "Found: nothing" in str(refused)
    assert "there is no MLLM 'other'" in str(LoadMllm.validate_inputs("other", True))
    assert LoadMllm.validate_inputs(FOLDER, True) is True and LoadAdapter.validate_inputs(ADAPTER_NAME, True) is True
    assert LoadMllm.validate_inputs(FOLDER, None) is True  # linked: not known yet
    assert hub.requests == []
    (mllm,) = LoadMllm.execute(FOLDER, "fp32", True).args
    (adapter,) = LoadAdapter.execute(ADAPTER_NAME, True).args
    assert mllm.hidden_size == adapter.sizes.hidden == 128
    assert LoadMllm.validate_inputs(FOLDER, False) is True and LoadAdapter.validate_inputs(ADAPTER_NAME, False) is True
    asked = len(hub.requests)
    LoadMllm.execute(FOLDER, "fp32", True)
    assert len(hub.requests) == asked
    (roots / FOLDER / BIG).unlink()
    assert LoadMllm.validate_inputs(FOLDER, True) is True
    assert f"is incomplete: {BIG} is missing" in str(LoadMllm.validate_inputs(FOLDER))


def combo(node: Any, name: str) -> list[str]:
    """What a node offers."""
    (found,) = [entry for entry in node.define_schema().inputs if entry.id == name]
    return list(found.options)


def test_other_forms_of_the_mllm_are_not_fetched_again(hub: HubServer, roots: Path) -> None:
    folder = llava_folder(roots / FOLDER)
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("pytorch_model*"):
        weights |= torch.load(path) if path.suffix == ".bin" else {}
        path.unlink()
    save_file(weights, folder / "model.safetensors")
    download_mllm()
    assert hub.requests == [] and LoadMllm.execute(FOLDER, "fp32", True).args[0].hidden_size == 128
