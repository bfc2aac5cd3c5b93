"""Workers on a cluster: whatever of it is lost, every row has one result in the end, and no server stays behind."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comfyui_source import SetupError
from setup_env import ensure_ray

from workbench import ROOT

HERE = Path(__file__).parent
SECONDS = 1800
WRAPPER = """import os, runpy
os.environ.update({variables})
runpy.run_path({main!r}, run_name="__main__")
"""

pytestmark = [pytest.mark.newest, pytest.mark.skipif(os.name == "nt", reason="kills processes by signals")]


@dataclass
class Cluster:
    """Ray's Python, what its processes get, and the process that holds the cluster."""

    python: Path
    variables: dict[str, str]
    process: "subprocess.Popen[str] | None" = None
    address: str = "local"

    def lose_machine(self) -> None:
        """Kill Ray on the machine that is not the head."""
        assert self.process is not None and self.process.stdin and self.process.stdout
        self.process.stdin.write("lose\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "lost"


@pytest.fixture(scope="module")
def ray() -> Cluster:
    """Ray in an environment of its own."""
    try:
        python = ensure_ray()
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    token = uuid.uuid4().hex * 2
    return Cluster(python, {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})


@pytest.fixture(scope="module")
def cluster(ray: Cluster) -> Iterator[Cluster]:
    """Two machines with a card each, as Ray believes."""
    variables = {**ray.variables, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(ray.python), str(HERE / "ray_cluster.py")]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, env=variables, **pipes) as process:
        assert process.stdout is not None
        yield Cluster(ray.python, ray.variables, process, process.stdout.readline().strip())
        assert process.stdin is not None
        process.stdin.close()


class Run:
    """Runs of one table in a place, on a cluster."""

    def __init__(self, place: Any, cluster: Cluster, count: int, seconds: float) -> None:
        fake = {"FAKE_LOG": str(place.log), "FAKE_MARKS": str(place.folder), "FAKE_SECONDS": str(seconds)}
        comfyui = place.folder / "comfyui"
        comfyui.mkdir()
        main = str(HERE / "fake_comfyui" / "main.py")
        (comfyui / "main.py").write_text(WRAPPER.format(variables=fake, main=main), encoding="utf-8")
        place.python, place.variables = str(cluster.python), cluster.variables
        photos = ("photo.jpg", "other.jpg")
        self.rows = [[f"r{i}", photos[i % 2], "cup", f"a cup {i % 3}", str(i)] for i in range(count)]
        words = ("--comfyui", str(comfyui), "--python", sys.executable)
        self.words = ("run", str(place.table(self.rows)), *words, "--address", cluster.address)
        self.place = place

    def start(self, executed: int) -> "subprocess.Popen[str]":
        """Begin or go on, and wait until the servers have run so many prompts in all."""
        process: subprocess.Popen[str] = self.place.start(*self.words)
        self.place.wait(lambda: len(self.place.executed()) >= executed)
        return process

    def processes(self) -> dict[int, list[str]]:
        """What runs for this run, servers and guards: their command lines by their process ids."""
        name = f"moma_batch-{json.loads((self.place.out / 'plan.json').read_text(encoding='utf-8'))['run']}"
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_text(encoding="utf-8", errors="replace").split("\0")
            except OSError:
                continue
            if any(name in word for word in words):
                found[int(path.parent.name)] = words
        return found

    def guards(self) -> dict[int, str]:
        """The guards: where their code lies, by their process ids."""
        found = {}
        for pid, words in self.processes().items():
            if scripts := [word for word in words if word.endswith("/guard.py")]:
                found[pid] = scripts[0]
        return found

    def assert_whole(self, lost: int) -> None:
        """Every row has its one picture, at most `lost` prompts ran in vain, and nothing is left behind."""
        results = self.place.results()
        assert [found["id"] for found in results] == [row[0] for row in self.rows]
        assert {found["status"] for found in results} == {"ok"}
        assert {found["picture"]: found["key"] for found in results} == self.place.pictures()
        said = [entry["task"] for entry in self.place.journal() if entry.get("status") == "ok"]
        assert len(said) == len(set(said)) == len(self.rows) + 6  # two photographs, three prompts
        prompts = len(self.rows) + 2  # of a photograph its three are encoded in one
        assert prompts <= len(self.place.executed()) <= len(said) + lost
        self.place.wait(lambda: not self.processes())


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status and output of a run, which must end in time."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def given_to_servers(log: Path) -> set[tuple[str | None, int]]:
    """The threads that stand-ins were told to compute with, and how far they give way to other programs."""
    entries = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return {(entry["threads"], entry["niceness"]) for entry in entries}


@pytest.mark.slow
def test_a_cluster_gives_the_pictures_of_one_machine(place: Any, ray: Cluster) -> None:
    run = Run(place, ray, 8, 0)
    status, output = end(place.start(*run.words, "--workers", "2"))
    assert status == 0, output
    run.assert_whole(0)
    assert {found["worker"] for found in place.results()} <= {"worker 1", "worker 2"}, "the first may do all at once"
    digests = {found["id"]: found["sha256"] for found in place.results()}
    given = given_to_servers(place.log)
    place.out, place.python, place.log = place.folder / "here", sys.executable, place.folder / "other.jsonl"
    place.variables = {**place.variables, "FAKE_LOG": str(place.log)}
    assert place.do("run", str(place.table(run.rows)), own=2)[0] == 0
    assert given_to_servers(place.log) == given, "with other threads a real one gives other pixels"
    assert {found["id"]: found["sha256"] for found in place.results()} == digests


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_and_a_killed_worker_costs_no_row(place: Any, cluster: Cluster) -> None:
    run = Run(place, cluster, 24, 0.2)
    process = run.start(9)
    process.kill()
    process.communicate()
    place.wait(lambda: not run.processes())
    process = run.start(16)
    guards = run.guards()
    assert len(guards) == 2, "one worker for each card"
    assert not any(script.startswith(str(ROOT)) for script in guards.values()), "the code comes with the run"
    stat = Path(f"/proc/{min(guards)}/stat").read_text(encoding="utf-8")
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    status, output = end(process)
    assert status == 0 and "the worker is gone" in output, output
    run.assert_whole(4 + 1)  # for the driver, of each worker what it ran, and what it had made and was not written yet


@pytest.mark.slow
def test_without_its_token_a_cluster_is_not_joined(place: Any, cluster: Cluster) -> None:
    run = Run(place, cluster, 1, 0)
    place.variables = {name: value for name, value in cluster.variables.items() if name != "RAY_AUTH_TOKEN"}
    place.variables["HOME"] = str(place.folder)
    status, output = end(place.start(*run.words))
    assert status == 2 and "`ray get-auth-token --generate` makes one" in output, output


@pytest.mark.slow
def test_a_lost_machine_costs_no_row_and_nobody_waits_for_it(place: Any, cluster: Cluster) -> None:
    """The last one: the cluster has a card less after it, and one that is full."""
    run = Run(place, cluster, 16, 0.2)
    process = run.start(9)
    cluster.lose_machine()
    status, output = end(process)
    assert status == 0 and "the worker is gone" in output, output
    run.assert_whole(1)


def test_without_ray_its_package_is_named(place: Any) -> None:
    table = place.table([["a", "photo.jpg", "cup", "a", "1"]])
    status, output = place.do("run", str(table), "--address", "auto", "--comfyui", "/opt/ComfyUI")
    assert status == 2 and "`pip install ray` there" in output
    status, output = place.do("run", str(table), "--address", "auto", "--comfyui", "ComfyUI")
    assert status == 2 and "from the root on" in output


def test_other_releases_of_ray_or_python_are_named() -> None:
    from moma_batch.cluster import _reason

    text = "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.10.4\nThis process"
    assert "the same releases of Ray and Python. Version mismatch" in _reason(RuntimeError(text))
