"""Nothing here depends on the machine: its locale, the folder of the checkout, the releases of tools that day."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from setup_env import dev_requirements

from workbench import ROOT

pytestmark = pytest.mark.newest

FOLDERS = ("benchmarks", "moma_batch", "moma_modules", "nodes", "scripts", "tests", "training", "workbench")
FILES = sorted([ROOT / "__init__.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
TEXT = {"read_text": 0, "write_text": 1}
"""Methods that read or write text, and which argument the encoding is."""
OPENING = {
    "open": (1, "r"),
    ".open": (0, "r"),
    "fdopen": (1, "r"),
    "NamedTemporaryFile": (0, "b"),
    "TemporaryFile": (0, "b"),
}
"""Functions that open a file: which argument the mode is, and what it is by default."""
OTHERS = ("Image", "os", "tarfile")
"""Their `open` reads no text."""


def in_the_locale(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text as the machine's locale says, since they do not name an encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        of = call.func.value if isinstance(call.func, ast.Attribute) else None
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if "encoding" in named or getattr(of, "id", "") in OTHERS:
            continue
        wrong = any(getattr(named.get(switch), "value", None) is True for switch in ("text", "universal_newlines"))
        if name in TEXT:
            wrong = len(call.args) <= TEXT[name]
        elif place := OPENING.get(f".{name}" if of and name == "open" else name):
            mode = named.get("mode") or (call.args[place[0]] if len(call.args) > place[0] else ast.Constant(place[1]))
            wrong = "b" not in ast.unparse(mode)
        if wrong:
            yield call.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='rb')", False),
        ("path.open('ab')", False),
        ("path.open()", True),
        ("Image.open(path)", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(words, text=True)", True),
        ("subprocess.run(words, encoding='utf-8')", False),
    ],
)
def test_calls_without_an_encoding_are_found(code: str, found: bool) -> None:
    assert list(in_the_locale(ast.parse(code))) == [1] * found


def test_text_is_read_and_written_alike_under_every_locale() -> None:
    wrong = [
        f"{path.relative_to(ROOT).as_posix()}:{line}"
        for path in FILES
        for line in in_the_locale(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, 'these need an encoding="utf-8"'


@pytest.mark.parametrize("folder", ["ComfyUI-MoMA", "1 Über-Name 猫", "class", "build"])
def test_lint_does_not_depend_on_the_folder(tmp_path: Path, folder: str) -> None:
    """Every module that makes its folder a package, in a folder of that name."""
    place = tmp_path / os.fsdecode(folder.encode())  # these bytes, whatever letters the locale takes them for
    for path in [ROOT / "pyproject.toml", *(path for path in FILES if path.name == "__init__.py")]:
        target = place / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        command = [sys.executable, "-m", "ruff", *words]
        done = subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0 and "No Python files" not in done.stderr, done.stdout + done.stderr


def test_the_tools_are_the_same_on_every_machine() -> None:
    for requirement in dev_requirements():
        name, separator, number = requirement.partition("==")
        assert separator, f"{requirement} may be another release tomorrow: pin it in pyproject.toml"
        assert version(name) == number


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="this is no clone")
@pytest.mark.parametrize("status", [0, 7])
def test_ci_runs_the_command_in_a_folder_named_as_users_name_it(tmp_path: Path, status: int) -> None:
    """With a Python that only says where it was called, and how."""
    temporary, programs = tmp_path / "with a space", tmp_path / "programs"
    temporary.mkdir()
    programs.mkdir()
    python = programs / "python3"
    script = f'#!/bin/sh\necho "$PWD"\nls "$@" pyproject.toml\ntouch "$TMPDIR/left over"\nexit {status}\n'
    python.write_text(script, encoding="utf-8")
    python.chmod(0o755)
    variables = {**os.environ, "TMPDIR": str(temporary), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = [str(ROOT / ".ci" / "run")]
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", check=False)
    folder, *shown = done.stdout.splitlines()
    assert Path(folder).name == "ComfyUI-MoMA" and Path(folder).is_relative_to(temporary)
    assert shown == ["pyproject.toml", "scripts/test.py"] and done.returncode == status, done.stderr
    assert not list(temporary.iterdir())
