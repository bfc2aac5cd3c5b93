"""Translations and help pages say what the server says of the nodes; what is missing is warned of."""

import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from workbench import ROOT
from workbench.bootstrap import comfyui_path
from workbench.comfy_server import ComfyServer

pytestmark = pytest.mark.server
LOCALES = sorted(path.name for path in (ROOT / "locales").iterdir())
TRANSLATED_COMBOS = {
    "MoMALoad": {"precision"},
    "MoMALoadMLLM": {"precision"},
    "MoMAConvertMLLM": {"precision"},
    "MoMAExtractSubject": {"fit"},
}
"""Others list files, samplers and schedulers."""

NOT_YET = re.compile("未翻译|未翻訳|미번역")
"""How `scripts/new_node.py` marks a name that a person has yet to translate."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui_path(), tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def nodes(server: ComfyServer) -> dict[str, Any]:
    return {name: node for name, node in server.object_info().items() if name.startswith("MoMA")}


def inputs(node: dict[str, Any]) -> dict[str, Any]:
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def told_of(missing: set[str], where: str) -> None:
    """A translation that is missing is shown in English: a new node need not wait for it."""
    if missing:
        warnings.warn(f"{where} does not translate {', '.join(sorted(missing))}", stacklevel=2)


def test_the_languages() -> None:
    assert LOCALES == ["ja", "ko", "zh"]


@pytest.mark.parametrize("locale", LOCALES)
def test_a_translation_covers_the_schema(server: ComfyServer, nodes: dict[str, Any], locale: str) -> None:
    served = json.loads(server.get("/i18n"))[locale]
    translated = {name: value for name, value in served["nodeDefs"].items() if name.startswith("MoMA")}
    assert served["nodeCategories"]["MoMA"]
    for name, texts in translated.items():
        node = nodes[name]
        assert texts["display_name"] != node["display_name"] and texts["description"]
        told_of({key for key in ("display_name",) if NOT_YET.search(texts[key])}, f"{locale}, {name}")
        outputs = {str(i) for i in range(len(node["output"]))}
        assert set(texts["inputs"]) <= set(inputs(node)) and set(texts.get("outputs", {})) <= outputs, name
        told_of(set(inputs(node)) - set(texts["inputs"]), f"{locale}, {name}")
        told_of(outputs - set(texts.get("outputs", {})), f"{locale}, outputs of {name}")
        for key, text in [*texts["inputs"].items(), *texts.get("outputs", {}).items()]:
            assert text["name"] and re.search(r"[^\x00-\x7f]", text["tooltip"]), f"{name}.{key}"
        combos = {key for key, text in texts["inputs"].items() if "options" in text}
        assert combos <= TRANSLATED_COMBOS.get(name, set())
        told_of(TRANSLATED_COMBOS.get(name, set()) - combos, f"{locale}, options of {name}")
        for key in combos:
            known, translated_too = set(inputs(node)[key][1]["options"]), set(texts["inputs"][key]["options"])
            assert translated_too <= known, f"{name}.{key}"
            told_of(known - translated_too, f"{locale}, {name}.{key}")
    told_of(set(nodes) - set(translated), locale)


def test_every_help_page_shows_its_node_and_names_its_settings(server: ComfyServer, nodes: dict[str, Any]) -> None:
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    for name, node in nodes.items():
        page = server.get(f"/extensions/ComfyUI-MoMA/docs/{name}.md").decode()
        assert page.startswith(f"# {node['display_name']}\n")
        for key, spec in inputs(node).items():
            if spec[0] in widgets or isinstance(spec[0], list):
                assert f"`{key}`" in page, f"{name}.md does not name {key}"
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
            assert Image.open(ROOT / "web" / "docs" / picture).width > 200
        assert f"(images/{name}.png)" in page
        assert "|---" not in page, "the help panel is too narrow for tables"


@pytest.mark.parametrize("locale", LOCALES)
def test_translated_help_pages_say_all_that_the_english_ones_say(
    server: ComfyServer, nodes: dict[str, Any], locale: str
) -> None:
    names = json.loads(server.get("/i18n"))[locale]["nodeDefs"]
    there = {name for name in nodes if (ROOT / "web" / "docs" / name / f"{locale}.md").is_file()}
    told_of(set(nodes) - there, f"web/docs in {locale}")
    for name in sorted(there):
        english, page = (
            server.get(f"/extensions/ComfyUI-MoMA/docs/{path}.md").decode() for path in (name, f"{name}/{locale}")
        )
        assert page.startswith(f"# {names[name]['display_name']}\n"), name
        blocks = re.compile(r"```.*?```", re.DOTALL)
        assert blocks.findall(page) == blocks.findall(english), name
        english, page = (blocks.sub("", text) for text in (english, page))
        for what in (r"`[^`]+`", r"\(images/.*?\)", r"(?m)^- ", r"https?://[^)\s]+"):
            assert sorted(set(re.findall(what, page))) == sorted(set(re.findall(what, english))), (name, what)
        assert len(re.findall(r"(?m)^- ", page)) == len(re.findall(r"(?m)^- ", english)), name
        for line in page.splitlines():
            if re.match(r"- |#|\w", line):
                assert re.search(r"[^\x00-\x7f]", line) or "`" in line, f"{name}: not translated: {line}"


def test_a_missing_translation_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="^ja, MoMASomething does not translate a, b$"):
        told_of({"b", "a"}, "ja, MoMASomething")
