"""Bringing workflows into the small world changes files and sizes, and nothing of the wiring."""

from typing import Any

import pytest
from workflow_files import NAMES, api, workflow

from workbench.small_world import CHECKPOINT, EXAMPLE, PROMPTS, in_small_world, shown_in_small_world

pytestmark = pytest.mark.newest
RUNNABLE = sorted(set(NAMES) - {"try_it"})


def links(prompt: dict[str, Any]) -> set[tuple[str, str, str, int]]:
    """Each link: target, input, source, output."""
    return {
        (name, key, value[0], value[1])
        for name, node in prompt.items()
        for key, value in node["inputs"].items()
        if isinstance(value, list)
    }


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_api_prompt_keeps_its_links_but_those_of_the_photo(name: str) -> None:
    prompt = api(name)
    changed = in_small_world(prompt)
    photos = {key for key, node in prompt.items() if node["class_type"] == "LoadImage"}
    (mini,) = [key for key, node in changed.items() if node["class_type"] == "MoMALoadMini"]
    kept = {link for link in links(prompt) if link[2] not in photos}
    moved = {(target, key, mini, 3 + output) for target, key, source, output in links(prompt) if source in photos}
    assert links(changed) == kept | moved
    assert "v1-5" not in str(changed) and "MoMA_llava_7b" not in str(changed)
    assert prompt == api(name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_workflow_keeps_its_links(name: str) -> None:
    content = workflow(name)
    changed = shown_in_small_world(content)
    assert changed["links"] == content["links"] and content == workflow(name)
    (mini,) = [node for node in changed["nodes"] if node["type"] == "MoMALoadMini"]
    assert mini["widgets_values"] == [CHECKPOINT, EXAMPLE]
    assert not any(node["type"] == "CheckpointLoaderSimple" for node in changed["nodes"])
    assert "MoMA_llava_7b" not in str(
        [node.get("widgets_values") for node in changed["nodes"] if node["type"] != "MarkdownNote"]
    )


def test_prompts_are_of_the_small_worlds_words() -> None:
    changed = in_small_world(api("new_context"))
    asked = [node["inputs"]["prompt"] for node in changed.values() if node["class_type"] == "MoMAExtractSubject"]
    assert asked == [PROMPTS["A cup on a beach at sunset."]]
