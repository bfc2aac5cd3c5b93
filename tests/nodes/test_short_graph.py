"""Load MoMA and Apply MoMA Subject: what the single nodes do, in fewer of them."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_modules.subject.subject import combine_subjects
from comfyui_moma.nodes.conditioning import TextEncode
from comfyui_moma.nodes.loaders import LoadAdapter, LoadBoth, LoadMllm
from comfyui_moma.nodes.patches import ApplyAdapter, ApplySubject, SelfAttnShortcut

from workbench.scene import negative, sample, tiny_adapter
from workbench.tiny_models import tiny_clip, tiny_vae

PROMPT = "A car on the moon."


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {"clip": tiny_clip(), "vae": tiny_vae()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strength": 0.4, "weight": 0.5},
        {"prompt": ""},
        {"region_mask": torch.ones(1, 8, 8).tril()},
        {"strength": 0.0},
    ],
    ids=lambda settings: ", ".join(settings) or "as it comes",
)
def test_the_picture_is_that_of_the_single_nodes(
    model: Any, adapter: Any, subject: Any, parts: dict[str, Any], settings: dict[str, Any]
) -> None:
    chosen = {"prompt": PROMPT, "strength": 1.0, "weight": 1.0, **settings}
    patched, positive, text = ApplySubject.execute(
        model, subject=replace(subject, adapter=adapter), **parts, **chosen
    ).args
    region = chosen.get("region_mask")
    (single,) = ApplyAdapter.execute(model, adapter, subject, chosen["weight"], 0.0, 1.0, region).args
    (single,) = SelfAttnShortcut.execute(
        single, adapter, subject, parts["vae"], parts["clip"], chosen["strength"], 0.05, 1.0, 0, region
    ).args
    encoded, same_text = TextEncode.execute(
        parts["clip"], subject, chosen["prompt"], "photo of a {subject}. {prompt}"
    ).args
    assert text == same_text
    # From the highest noise level on, where the shortcut is still off.
    options = {"sampler": "euler", "scheduler": "normal"}
    assert torch.equal(sample(patched, positive, negative(), **options), sample(single, encoded, negative(), **options))


def test_the_model_that_comes_in_stays_as_it_is(model: Any, adapter: Any, subject: Any, parts: dict[str, Any]) -> None:
    before = sample(model, negative(), negative())
    own = replace(subject, adapter=adapter)
    ApplySubject.execute(model, subject=own, prompt=PROMPT, strength=1.0, weight=1.0, **parts)
    assert model.get_attachment("moma") is None and torch.equal(sample(model, negative(), negative()), before)


def test_a_saved_subject_needs_its_adapter(model: Any, adapter: Any, subject: Any, parts: dict[str, Any]) -> None:
    chosen = {"prompt": PROMPT, "strength": 1.0, "weight": 1.0, **parts}
    with pytest.raises(ValueError, match=r"^adapter: a saved subject does not bring its adapter along\. Connect Load"):
        ApplySubject.execute(model, subject=subject, **chosen)
    assert ApplySubject.execute(model, subject=subject, adapter=adapter, **chosen).args
    with pytest.raises(ValueError, match=r"^subject was extracted with another adapter"):
        ApplySubject.execute(model, subject=subject, adapter=tiny_adapter(embedding=56), **chosen)


def test_a_subject_is_the_same_one_with_and_without_its_adapter(adapter: Any, subject: Any) -> None:
    own = replace(subject, adapter=adapter)
    assert own.key == subject.key and own == own and "adapter=" not in repr(own)


def test_an_adapter_leaves_memory_with_the_last_subject_that_has_it(
    model: Any, subject: Any, parts: dict[str, Any]
) -> None:
    """Also after a run, whose results are kept for the next one."""
    loaded = tiny_adapter()
    own = replace(subject, adapter=loaded)
    patched, positive, _ = ApplySubject.execute(
        model, subject=own, prompt=PROMPT, strength=1.0, weight=1.0, **parts
    ).args
    sample(patched, positive, negative())
    held = weakref.ref(loaded.module)
    del loaded, patched, positive
    gc.collect()
    assert held() is not None
    del own
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_references_one_may_be_saved(
    model: Any, adapter: Any, subject: Any, parts: dict[str, Any], order: int
) -> None:
    both = combine_subjects(*[replace(subject, adapter=adapter), subject][::order])
    assert ApplySubject.execute(model, subject=both, prompt=PROMPT, strength=1.0, weight=1.0, **parts).args


@pytest.mark.parametrize("missing", ["model_name", "adapter_name"])
def test_one_loader_says_of_both_files_what_theirs_say(missing: str) -> None:
    names = {"model_name": "MoMA_llava_7b", "adapter_name": "MoMA_llava_7b/attn_adapters_projectors.th"}
    found = LoadBoth.validate_inputs(**{**names, missing: "gone.safetensors"}, download=True)
    single = LoadMllm if missing == "model_name" else LoadAdapter
    assert isinstance(found, str) and found.startswith(f"{missing}: there is no ")
    assert found == single.validate_inputs("gone.safetensors", True)
    assert LoadBoth.validate_inputs(**names, download=True) is True


def test_one_loader_gives_what_the_two_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    from workbench.random_weights import SMALL_LLAVA, adapter_file, llava_folder

    folder = llava_folder(tmp_path / "MoMA_llava_7b", SMALL_LLAVA)
    adapter_file(folder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "moma", ([str(tmp_path)], {".th", ".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    name = "MoMA_llava_7b/attn_adapters_projectors.th"
    mllm, adapter = LoadBoth.execute("MoMA_llava_7b", "fp32", name).args
    assert mllm.identity == LoadMllm.execute("MoMA_llava_7b", "fp32").args[0].identity
    assert adapter.identity == LoadAdapter.execute(name).args[0].identity
    assert LoadBoth.fingerprint_inputs("MoMA_llava_7b", "fp32", name) == " ".join(
        [LoadMllm.fingerprint_inputs("MoMA_llava_7b", "fp32"), LoadAdapter.fingerprint_inputs(name)]
    )
