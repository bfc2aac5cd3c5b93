"""What the documentation names exists."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from shown import TRAINED, noted, sources

from workbench import ROOT

pytestmark = pytest.mark.newest

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "web" / "docs").rglob("*.md")])
PYPROJECT = ROOT / "pyproject.toml"
LONGEST_EXECUTE = 60


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_pictures_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = [ROOT, ROOT / "moma_modules", page.parent]
    for name in re.findall(r"`([\w./-]+\.(?:py|md|json))`", text):
        if "/" in name and not name.startswith("output/"):
            assert any((place / name).exists() for place in places), f"{page.name} names {name}"
    # ComfyUI resolves what a node's help page links to from web/docs, also for the translated pages in its folders.
    help_pages = ROOT / "web" / "docs"
    base = help_pages if help_pages in page.parents else page.parent
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (base / link).exists(), f"{page.name} links to {link}"


def test_the_architecture_names_every_module_that_matters() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in ("nodes", "moma_modules"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            assert path.stem in ("__init__", "types", "samplers") or f"`{name}`" in text, f"it does not name {name}"


def test_pictures_are_small_and_used() -> None:
    texts = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, PYPROJECT])
    for path in [*(ROOT / "docs" / "images").glob("*.png"), *(ROOT / "web" / "docs" / "images").iterdir()]:
        assert path.stat().st_size < 450_000, path.name
        assert path.name in texts, f"no page shows {path.name}"


def test_pictures_show_what_there_is_now() -> None:
    """A workflow, node, help page or drawing that changed wants its picture anew."""
    made = noted()
    stale = sorted(name for name, digest in sources().items() if made.get(name) != digest)
    assert not stale, f"made of something else than there is now; `python3 scripts/screenshots.py PART`: {stale}"
    assert all((ROOT / name).is_file() for name in made)


def test_a_changed_node_makes_its_picture_stale(tmp_path: Path) -> None:
    """And no other; the metadata of a workflow makes none."""
    for name in ("workflows", "subgraphs", "tests/data", "tests/api", "scripts/artwork", "web/docs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.jpg", "images", "golden", "mllm")
        )
    trained = tmp_path / TRAINED
    trained.parent.mkdir()
    shutil.copyfile(ROOT / TRAINED, trained)
    before = sources(tmp_path)
    assert before == sources()
    workflow, contract = tmp_path / "workflows" / "simple.json", tmp_path / "tests" / "data" / "object_info.json"
    content = json.loads(workflow.read_text("utf-8"))
    workflow.write_text(json.dumps({**content, "extra": {}}), encoding="utf-8")
    assert sources(tmp_path) == before
    content["nodes"][0]["pos"][0] += 10
    workflow.write_text(json.dumps(content), encoding="utf-8")
    nodes = json.loads(contract.read_text("utf-8"))
    nodes["MoMASaveSubject"]["display_name"] = "Keep MoMA Subject"
    contract.write_text(json.dumps(nodes), encoding="utf-8")
    after = sources(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"docs/images/simple.png", "web/docs/images/MoMASaveSubject.png"}
    queued = tmp_path / "tests" / "api" / "pose.json"
    queued.write_text(queued.read_text("utf-8").replace('"seed": 1', '"seed": 3'), encoding="utf-8")
    again = sources(tmp_path)
    assert {name for name in before if after[name] != again[name]} == {"workflows/pose.jpg"}
    trained.write_text("{}", encoding="utf-8")
    assert {name for name in before if sources(tmp_path)[name] != again[name]} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "workflows").glob("*.jpg")
    }


def test_readme_says_what_each_template_shows() -> None:
    """The editor shows of a pack's templates the file's name and its picture, and no more."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Workflows\n")[1].split("\n## ")[0]
    listed = re.findall(r"(?m)^\| \[(\w+)\]\(docs/images/\1\.png\) \| \S", text)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def test_the_registry_gets_an_icon_and_a_banner() -> None:
    """An icon of at most 400x400, a banner of 21:9, from the repository."""
    text = PYPROJECT.read_text(encoding="utf-8")
    repository = re.search(r'^Repository = "https://github.com/(.+)"$', text, re.MULTILINE)
    assert repository is not None
    sizes = {}
    for name in ("Icon", "Banner"):
        address = f"https://raw.githubusercontent.com/{repository[1]}/main/"
        found = re.search(rf'^{name} = "{address}(.+)"$', text, re.MULTILINE)
        assert found is not None, name
        sizes[name] = Image.open(ROOT / found[1]).size
    assert max(sizes["Icon"]) <= 400
    assert sizes["Banner"][0] * 9 == sizes["Banner"][1] * 21


def test_there_is_one_way_to_warn() -> None:
    """`messages.warn`, which a user sees in every view."""
    for path in [*(ROOT / "nodes").glob("*.py"), *(ROOT / "moma_modules").rglob("*.py")]:
        uses = "logging.warning" in path.read_text(encoding="utf-8") or "_LOG.warning" in path.read_text("utf-8")
        assert uses == (path.name == "messages.py"), f"{path.name} logs by itself"


def test_nodes_are_thin() -> None:
    for path in (ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                assert (node.end_lineno or 0) - node.lineno < LONGEST_EXECUTE, f"{path.name}:{node.lineno}"


def messages() -> list[str]:
    """Every text in the product's sources, with `...` for what is filled in."""
    found: list[str] = []
    for path in [*(ROOT / "nodes").glob("*.py"), *(ROOT / "moma_modules").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        comments = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in comments:
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value if isinstance(part, ast.Constant) else "..." for part in parts]
            if all(isinstance(part, str) for part in fixed):
                found.append("".join(map(str, fixed)))
    return found


def test_troubleshooting_quotes_what_is_said() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = messages()
    headings = [" ".join(found.split()) for found in re.findall(r"\n\n\*\*(.+?)\*\*", text, re.DOTALL)]
    assert len(headings) > 30
    unknown = {
        words
        for heading in headings
        for words in re.split(r" ?\.\.\. ?(?:/ )?", heading)
        if words and not any(words in one for one in said)
    }
    assert not unknown, f"docs/troubleshooting.md quotes what no source says: {sorted(unknown)}"
