"""Bringing prompts for photographs into the small world changes files and sizes, and nothing of the wiring."""

from typing import Any

import pytest
from workflow_files import STARTS_SMALL, photographs

from workbench.small_world import CFG, CHECKPOINT, in_small_world

pytestmark = pytest.mark.newest
FOR_PHOTOGRAPHS = {name: photographs(name) for name in STARTS_SMALL}


def links(prompt: dict[str, Any]) -> set[tuple[str, str, str, int]]:
    """Each link: target, input, source, output."""
    return {
        (name, key, value[0], value[1])
        for name, node in prompt.items()
        for key, value in node["inputs"].items()
        if isinstance(value, list)
    }


@pytest.mark.parametrize("name", FOR_PHOTOGRAPHS)
def test_a_prompt_keeps_its_links(name: str) -> None:
    prompt = FOR_PHOTOGRAPHS[name]
    before = str(prompt)
    changed = in_small_world(prompt, steps=2)
    assert links(changed) == links(prompt) and str(prompt) == before
    assert "v1-5" not in str(changed) and "MoMA_llava_7b" not in str(changed)
    by_class = {node["class_type"]: node["inputs"] for node in changed.values()}
    assert by_class["MoMALoadMini"]["ckpt_name"] == CHECKPOINT
    sampling = by_class.get("KSampler") or by_class["MoMAStrengthStudy"]
    assert (sampling["steps"], sampling["cfg"]) == (2, CFG)
    assert by_class["EmptyLatentImage"]["width"] == 128
