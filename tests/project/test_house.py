"""The folders are rooms named after what happens in them, and imports run one way through them."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from comfyui_source import add_workbench

import nodes
from workbench import ROOT
from workbench.bootstrap import comfyui_path

pytestmark = pytest.mark.newest

MODULES = ROOT / "moma_modules"
MAY_IMPORT = {
    "host": set(),
    "download": {"host"},
    "adapter": {"host", "download"},
    "mllm": {"host", "download"},
    "subject": {"host"},
    "mini": {"host"},
    "prompt": {"host", "subject"},
    "sampling": {"host", "adapter", "subject", "prompt"},
}
COMMAND_LINES = {"convert_adapter", "convert_mllm"}
"""Beside the rooms: `python -m moma_modules.NAME`."""
LONGEST, SHORTEST = 300, 25
TABLES_OF_NAMES = {"download/release.py"}
FILES = sorted(path for path in MODULES.rglob("*.py") if path.name != "__init__.py")


def module_name(path: Path) -> str:
    """As in `sampling.run`."""
    return ".".join(path.relative_to(MODULES).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """The modules of the pack that a file imports, as in `host.disk`, and others as in `comfy.sd`."""
    above = [*path.relative_to(MODULES).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = above[: len(above) - node.level + 1] if node.level else []
            yield ".".join([*start, *(node.module or "").split(".")]).strip(".")


def test_every_file_is_in_a_room() -> None:
    rooms = {path.relative_to(MODULES).parts[0] for path in FILES}
    assert rooms == {*MAY_IMPORT, *(f"{name}.py" for name in COMMAND_LINES)}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_one_above_it(room: str) -> None:
    allowed = {room, *MAY_IMPORT[room]}
    rooms = set(MAY_IMPORT)
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in (MODULES / room).rglob("*.py")
        for name in imports(path)
        if name.partition(".")[0] in rooms - allowed
    ]
    assert not wrong


def test_no_files_import_each_other() -> None:
    known = {module_name(path) for path in FILES}
    list(TopologicalSorter({module_name(path): known & set(imports(path)) for path in FILES}).static_order())


def test_a_room_above_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on a file of a room that imports one above it in each way of writing it."""
    monkeypatch.setitem(globals(), "MODULES", tmp_path)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "a.py").write_text("from ..sampling.run import RunState\nfrom . import disk\n", "utf-8")
    assert list(imports(tmp_path / "host" / "a.py")) == ["sampling.run", "host"]
    with pytest.raises(AssertionError, match="imports sampling"):
        test_no_room_imports_one_above_it("host")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(MODULES).as_posix())
def test_no_file_is_a_drawer_or_a_crumb(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    crumb = lines < SHORTEST and path.relative_to(MODULES).as_posix() not in TABLES_OF_NAMES
    assert not crumb and lines <= LONGEST, f"{lines} lines"


@pytest.mark.parametrize("name", ["adapter/networks.py", "mllm/module.py"])
def test_the_networks_are_plain_modules(name: str) -> None:
    """They take the leaves that they are made of; loading, patchers and caches are elsewhere."""
    assert not [found for found in imports(MODULES / name) if found.partition(".")[0] in ("comfy", "host")]


def test_tests_lie_in_folders_like_those_of_what_they_test() -> None:
    tests = ROOT / "tests"
    assert not list(tests.glob("test_*.py"))
    assert {path.parent.name for path in tests.glob("*/test_*.py")} == {
        *MAY_IMPORT,
        *("batch", "nodes", "training", "workbench"),
        *("other_nodes", "server", "project"),
    }


def stems(folder: str) -> set[str]:
    """What its files are called by those who have the folder on the path, and the folder itself."""
    return {folder, *(path.stem for path in (ROOT / folder).rglob("*.py"))}


@pytest.mark.parametrize("folder", ["nodes", "moma_modules", "workbench", "scripts", "benchmarks", "training"])
def test_what_is_shared_with_the_tests_is_the_workbench(folder: str) -> None:
    """Nothing imports from tests. The workbench needs neither scripts nor benchmarks, the product none of them."""
    barred = stems("tests")
    if folder in ("nodes", "moma_modules", "workbench"):
        barred |= stems("scripts") | stems("benchmarks")
    if folder in ("nodes", "moma_modules"):
        barred.add("workbench")
    for path in (ROOT / folder).rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
        assert not found & barred, path


def test_comfyuis_modules_come_before_those_of_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(nodes.__file__) == comfyui_path() / "nodes.py"
    monkeypatch.setattr(sys, "path", ["", str(comfyui_path())])
    add_workbench()
    add_workbench()
    assert sys.path == ["", str(comfyui_path()), str(ROOT)]


def test_what_is_computed_of_pictures_words_and_maps_needs_no_comfyui() -> None:
    with_it = {module_name(path) for path in FILES if any(name.startswith("comfy") for name in imports(path))}
    assert not with_it & {"subject.reference_image", "subject.reference_mask", "prompt.subject_tokens"}
    assert not with_it & {"prompt.clip_tokens", "prompt.choices", "prompt.marks", "sampling.subject_mask"}
    assert not with_it & {"adapter.file", "mllm.checkpoint", "mllm.weights", "mllm.convert", "subject.run_log"}
    assert "sampling.wrappers" in with_it
