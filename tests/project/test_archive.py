"""The archive that the registry publishes and the Manager installs, made and installed as they do."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest
from comfy_cli.file_utils import list_git_tracked_files
from PIL import Image

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer

pytestmark = [pytest.mark.server, pytest.mark.newest]
INSTALLED_AS = "moma"
"""The folder that the Manager installs into: the project's name."""
FOLDERS = ("locales", "moma_batch", "moma_modules", "nodes", "subgraphs", "web", "workflows", "weights")
FILES = ("CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml")
HEADLESS = ("docs/api.md", "docs/headless.md", "tests/api/")
"""Of folders for developers what serves those who run it without the editor."""
FOR_DEVELOPERS = ("benchmarks", "docs", "scripts", "tests", "training", "workbench")
HIDDEN = (".ci", ".comfyignore", ".github", ".gitignore", "CONTRIBUTING.md")
BYTES = 42_000_000
LANGUAGES = ("", "/ja", "/ko", "/zh")


def files_of_the_repository() -> list[str]:
    """What git knows of; in a copy that is no clone, what lies in the folders that a clone has."""
    if known := list_git_tracked_files(ROOT):
        return [name for name in known if (ROOT / name).is_file()]
    tops = (*FOLDERS, *FILES, *FOR_DEVELOPERS, *HIDDEN)
    paths = (path for top in tops for path in [ROOT / top, *(ROOT / top).rglob("*")])
    return [path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """What `comfy node pack` makes of the repository."""
    place = tmp_path_factory.mktemp("repository")
    for name in files_of_the_repository():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / name)
    if shutil.which("git"):  # else comfy-cli takes all files, here the same ones
        for words in (["init", "--quiet"], ["add", "--all", "--force"]):
            subprocess.run(["git", *words], cwd=place, check=True)
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", "pack"]
    variables = {**os.environ, "HOME": str(place.parent), "XDG_CONFIG_HOME": str(place.parent / "config")}
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and "Not including" not in done.stdout, done.stdout + done.stderr
    (made,) = place.glob("*.zip")
    return zipfile.ZipFile(made)


@pytest.fixture(scope="module")
def server(archive: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("server")
    archive.extractall(base / "custom_nodes" / INSTALLED_AS)
    with ComfyServer(comfyui_path(), base, pack=None) as started:
        yield started


def test_the_archive_holds_what_runs_and_nothing_else(archive: zipfile.ZipFile) -> None:
    wanted = {
        name for name in files_of_the_repository() if name.startswith((*(f"{top}/" for top in FOLDERS), *HEADLESS))
    }
    assert len(wanted) > 150 and set(archive.namelist()) == wanted | set(FILES)
    assert sum(info.compress_size for info in archive.infolist()) < BYTES


def test_an_installed_archive_has_its_nodes(server: ComfyServer) -> None:
    found = {name for name in server.object_info() if name.startswith("MoMA")}
    assert found == set(json.loads((ROOT / "tests" / "data" / "object_info.json").read_text(encoding="utf-8")))
    assert "IMPORT FAILED" not in server.log() and "Traceback" not in server.log()


def test_an_installed_archive_has_its_help_pages(server: ComfyServer) -> None:
    """As the editor asks for them, in every language, with the pictures that they show."""
    for name in server.object_info():
        if name.startswith("MoMA"):
            for language in LANGUAGES:
                page = server.get(f"/extensions/{INSTALLED_AS}/docs/{name}{language}.md").decode()
                assert page.startswith("# ") and f"images/{name}.png" in page
            picture = server.get(f"/extensions/{INSTALLED_AS}/docs/images/{name}.png")
            assert Image.open(io.BytesIO(picture)).size[0] > 200


def test_an_installed_archive_has_its_translations(server: ComfyServer) -> None:
    served = json.loads(server.get("/i18n"))
    for locale in ("ja", "ko", "zh"):
        own = json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))
        assert own.items() <= served[locale]["nodeDefs"].items()


def test_an_installed_archive_has_its_workflows_and_thumbnails(server: ComfyServer) -> None:
    names = json.loads(server.get("/workflow_templates"))[INSTALLED_AS]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    for name in names:
        address = f"/api/workflow_templates/{INSTALLED_AS}/{name}"
        own = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        assert json.loads(server.get(f"{address}.json")) == own
        assert Image.open(io.BytesIO(server.get(f"{address}.jpg"))).size == (768, 512)


def test_an_installed_archive_has_its_blueprint(server: ComfyServer) -> None:
    found = json.loads(server.get("/global_subgraphs"))
    (key,) = [key for key, entry in found.items() if entry["info"]["node_pack"] == f"custom_nodes.{INSTALLED_AS}"]
    own = (ROOT / "subgraphs" / "MoMA personalize.json").read_text(encoding="utf-8")
    assert json.loads(json.loads(server.get(f"/global_subgraphs/{key}"))["data"]) == json.loads(own)
