"""A list into Extract Subject Features: asked together, with the results of one by one, and each entry for itself."""

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.model_management
import execution
import folder_paths
import numpy as np
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import CurrentNodeContext
from comfyui_moma.moma_modules.host.folders import user_folder
from comfyui_moma.moma_modules.mllm import encode
from comfyui_moma.moma_modules.mllm.encode import prompt_ids
from comfyui_moma.moma_modules.mllm.entries import Question, executing_entry, note_entry
from comfyui_moma.moma_modules.mllm.hidden_state_cache import HIDDEN_STATES, HiddenStateCache
from comfyui_moma.moma_modules.mllm.loading import Mllm, load_mllm
from comfyui_moma.nodes import ExtractSubject

from workbench.random_weights import HIDDEN, llava_folder
from workbench.scene import tiny_adapter

PROMPTS = ["A car in autumn.", "A car in the snow, at night.", "A cat on the moon."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture(scope="module")
def adapter() -> Any:
    return tiny_adapter(hidden=HIDDEN)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user folder of the test's own; in the end nothing waits for an entry any more."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    yield
    assert not any(thing.asked for thing in gc.get_objects() if type(thing) is Mllm)


def picture(seed: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 40, 40, 3, generator=torch.Generator().manual_seed(seed))


def execute(mllm: Mllm, adapter: Any, **lists: Any) -> list[Any]:
    """The subjects, from lists of inputs, as ComfyUI's executor calls a node for them."""
    given = {"mllm": [mllm], "adapter": [adapter], "subject": ["car"], "fit": ["squash"], **lists}
    node, prompt = ExtractSubject(), uuid4().hex

    async def call(function: str) -> list[Any]:
        hidden: dict[str, Any] = {"hidden_inputs": {}}
        return await execution._async_map_node_over_list(prompt, "7", node, given, function, v3_data=hidden)

    async def both() -> list[Any]:
        await call("check_lazy_status")
        return await call(ExtractSubject.FUNCTION)

    with torch.inference_mode():
        outputs = asyncio.run(both())
    return [getattr(output, "args", (output,))[0] for output in outputs]


def forwards(mllm: Mllm) -> list[int]:
    """The tokens of each forward from now on."""
    seen: list[int] = []
    mllm.loaded.module.language.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    return seen


def kept() -> int:
    """Hidden states on the disk."""
    return len(list(user_folder(HIDDEN_STATES).glob("*"))) if user_folder(HIDDEN_STATES).exists() else 0


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_list_is_one_forward_for_each_picture_and_gives_what_one_by_one_gives(folder: Path, adapter: Any) -> None:
    half = torch.zeros(1, 40, 40)
    half[..., :20] = 1
    lists: dict[str, list[Any]] = {
        "image": [picture(0), picture(0), picture(1), picture(2, count=2)],
        "prompt": [*PROMPTS, PROMPTS[0]],
        "subject": ["car", "stuffed animal"],  # of a shorter list the last one goes on being used
        "mask": [half],
        "cache": [False],
    }
    mllm = load_mllm(folder, "fp32")
    seen = forwards(mllm)
    together = execute(mllm, adapter, **lists)
    assert len(seen) == 4  # two prompts for one picture, one for another, one for each of a batch of two
    alone = load_mllm(folder, "fp32")
    for number, made in enumerate(together):
        own = {name: [values[min(number, len(values) - 1)]] for name, values in lists.items()}
        (expected,) = execute(alone, adapter, **own)
        alone.loaded.beginnings._kept.clear()
        assert distance(made.embedding, expected.embedding) < 5e-5
        assert (made.word, made.prompt) == (expected.word, expected.prompt)
        assert torch.equal(made.images, expected.images) and torch.equal(made.masks, expected.masks)


def test_a_bad_entry_names_itself_and_the_others_are_kept(folder: Path, adapter: Any) -> None:
    lists = {"image": [picture(0)], "prompt": PROMPTS, "subject": ["car", " ", "cat"]}
    with pytest.raises(ValueError, match=r"^Entry 2 of the list: subject is empty: give the word"):
        execute(load_mllm(folder, "fp32"), adapter, **lists)
    assert kept() == 2
    repaired = load_mllm(folder, "fp32")
    made = execute(repaired, adapter, image=[picture(0)], prompt=PROMPTS[::2], subject=["car", "cat"])
    assert [one.word for one in made] == ["car", "cat"] and "loaded" not in vars(repaired)


def test_where_nothing_is_kept_a_bad_entry_is_named_first(folder: Path, adapter: Any) -> None:
    mllm = load_mllm(folder, "fp32")
    lists = {"image": [picture(0), picture(1) * 0], "prompt": PROMPTS, "cache": [False]}
    with pytest.raises(ValueError, match=r"^Entry 2 of the list: image is black\."):
        execute(mllm, adapter, **lists)
    assert "loaded" not in vars(mllm)


def test_a_result_with_nan_names_its_entry(folder: Path, adapter: Any) -> None:
    mllm = load_mllm(folder, "fp32")
    first, second, third = ({*prompt_ids(mllm.tokenizer, "car", prompt)} for prompt in PROMPTS)
    embedded, of_third = mllm.loaded.module.language.embed_tokens.weight, list(third - first - second)
    with torch.inference_mode():
        before = embedded[of_third].clone()
        embedded[of_third] = torch.nan
    try:
        with pytest.raises(ValueError, match=r"^Entry 3 of the list: mllm \S+ gave NaN for this picture and prompt"):
            execute(mllm, adapter, image=[picture(0)], prompt=PROMPTS)
        assert kept() == 2  # though NaN reaches all that are in one forward
        with pytest.raises(ValueError, match="^mllm"):
            execute(mllm, adapter, image=[picture(1)], prompt=PROMPTS[2:])
        assert execute(mllm, adapter, image=[picture(1)], prompt=PROMPTS[:1])  # it was not kept for the next prompt
    finally:  # other tests share the weights
        with torch.inference_mode():
            embedded[of_third] = before


def test_one_entry_alone_has_the_message_alone(folder: Path, adapter: Any) -> None:
    with pytest.raises(ValueError, match="^subject is empty"):
        execute(load_mllm(folder), adapter, image=[picture(0)], prompt=["A car."], subject=[""])


def test_an_entry_that_another_node_has_blocked_blocks_no_other(folder: Path, adapter: Any) -> None:
    mllm = load_mllm(folder, "fp32")
    seen = forwards(mllm)
    blocked = ExecutionBlocker(None)
    first, second, third = execute(mllm, adapter, image=[picture(0)], prompt=[PROMPTS[0], blocked, PROMPTS[2]])
    assert second is blocked and (first.prompt, third.prompt) == (PROMPTS[0], PROMPTS[2])
    assert len(seen) == 1


def test_cancel_loses_nothing_that_was_there(folder: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PACK", 1)  # each prompt a forward of its own
    mllm = load_mllm(folder, "fp32")
    seen = forwards(mllm)
    stop = mllm.loaded.module.language.layers[1].register_forward_hook(
        lambda *_: comfy.model_management.interrupt_current_processing(len(seen) == 2) or None
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(mllm, adapter, image=[picture(0)], prompt=PROMPTS)
    comfy.model_management.interrupt_current_processing(False)
    stop.remove()
    assert kept() == 1 and len(seen) == 2 and not mllm.asked
    assert len(execute(mllm, adapter, image=[picture(0)], prompt=PROMPTS)) == 3
    assert kept() == 3 and len(seen) == 4


@dataclass(frozen=True)
class Asked:
    """A small entry."""

    questions: list[Question]
    cache: HiddenStateCache | None = None


def test_memory_is_flat_over_lists_of_many_prompts(folder: Path) -> None:
    mllm = load_mllm(folder, "fp32")
    seen = forwards(mllm)
    image, mask = np.full((16, 16, 3), 7, np.uint8), np.ones((16, 16), bool)

    def run(name: str) -> None:
        asked = [Asked([Question(image, mask, ("car", f"A car, {name}, number {i}."))]) for i in range(200)]
        for number, one in enumerate(asked):
            with CurrentNodeContext(name, "7", number):
                note_entry(mllm, lambda one=one: one)
        for number, one in enumerate(asked):
            with CurrentNodeContext(name, "7", number), executing_entry(mllm) as (listed, found):
                assert found == number and listed.entry(number, lambda: pytest.fail("it was noted")) is one
                (hidden,) = listed.answers(mllm, one)
                assert hidden.shape == (1, HIDDEN)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    with torch.inference_mode():
        run("first")
        before, size = tensors(), mllm.loaded.beginnings.size
        run("second")
    assert tensors() == before and mllm.loaded.beginnings.size == size
    patches = (112 // 14) ** 2
    assert 2 < len(seen) < 20 and max(seen) <= patches + encode.PACK + 100
