"""What people type into the editor's search finds the node that they mean, ranked by the editor itself."""

from collections.abc import Iterator

import pytest
from browser import Editor
from editors import editor_of
from frontends import NEWEST_FRONTEND, OLDEST_FRONTEND

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]
BLUEPRINT = "MoMA personalize"
FIRST = {
    "moma": "MoMALoad",
    "load moma": "MoMALoad",
    "ipadapter loader": "MoMALoad",
    "load adapter": "MoMALoadAdapter",
    "llava": "MoMALoadMLLM",
    "vlm": "MoMALoadMLLM",
    "quantize": "MoMAConvertMLLM",
    "ipadapter": "MoMAApplySubject",
    "image prompt": "MoMAApplySubject",
    "keep character": "MoMAApplySubject",
    "consistent character": "MoMAApplySubject",
    "personalize": BLUEPRINT,
    "reference image": "MoMAExtractSubject",
    "multiple images": "MoMACombineSubjects",
    "subject prompt": "MoMATextEncode",
    "two subjects": "MoMAMarkSubject",
    "region mask": "MoMAApplyAdapter",
    "self attention": "MoMASelfAttnShortcut",
    "style strength": "MoMASelfAttnShortcut",
    "mask": "MoMASubjectMask",
    "attention map": "MoMASubjectMask",
    "save subject": "MoMASaveSubject",
    "load subject": "MoMALoadSubject",
    "xy plot": "MoMAStrengthStudy",
    "grid": "MoMAContactSheet",
    "demo": "MoMALoadMini",
}
"""Which of the pack's nodes is first. The editor ranks by ids and names, and only what neither has by aliases."""
AMONG = {
    "subject": {"MoMAExtractSubject", "MoMAApplySubject"},
    "reference": {"MoMAExtractSubject", "MoMACombineSubjects"},
    "personalize": {"MoMAApplySubject"},
}
"""Which are listed at all."""


@pytest.fixture(scope="module", params=[None, OLDEST_FRONTEND, NEWEST_FRONTEND])
def editor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    """The editor that this ComfyUI brings (None), and others, of a server without models."""
    with editor_of(request.param, tmp_path_factory.mktemp("server")) as (_, opened):
        yield opened


def ours(editor: Editor, text: str) -> list[str]:
    """Which of the pack's nodes a search lists, in its order."""
    return [name for name in editor.search(text) if name.startswith("MoMA")]


def test_a_search_finds_the_node_that_is_meant(editor: Editor) -> None:
    found = {text: next(iter(ours(editor, text)), None) for text in FIRST}
    assert found == FIRST
    for text, names in AMONG.items():
        assert names <= set(ours(editor, text)), text


def test_moma_finds_every_node(editor: Editor) -> None:
    script = """() => Object.values(LiteGraph.registered_node_types).map(kind => kind.nodeData)
        .filter(data => data?.name.startsWith('MoMA') && !data.dev_only).map(data => data.name)"""
    names = set(editor.page.evaluate(script))
    assert {"MoMAExtractSubject", "MoMASelfAttnShortcut", "MoMALoad", "MoMAApplySubject"} <= names
    assert names | {BLUEPRINT} == set(ours(editor, "moma"))
