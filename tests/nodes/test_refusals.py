"""What a user reads when something does not fit: each refusal names the input, what was found and what to do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.host.folders import MODELS, SUBJECTS
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.moma_modules.subject.subject import combine_subjects
from comfyui_moma.nodes.extract import ExtractSubject
from comfyui_moma.nodes.loaders import LoadAdapter, LoadMllm
from comfyui_moma.nodes.mask import SubjectMask
from comfyui_moma.nodes.patches import ApplyAdapter, SelfAttnShortcut
from comfyui_moma.nodes.subject import LoadSubject

from workbench import ROOT
from workbench.scene import moma, negative, positive, sample, tiny_adapter, tiny_subject
from workbench.tiny_models import TINY, adapter_groups, tiny_model, tiny_vae

DATA = ROOT / "tests" / "data"


def apply(model: Any, adapter: Any, subject: Any, **changes: Any) -> Any:
    inputs = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, **changes}
    return ApplyAdapter.execute(model, adapter, subject, **inputs)


def sdxl() -> Any:
    """SDXL's topology, small."""
    settings = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_heads": -1,
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "context_dim": 64,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    base = comfy.model_base.SDXL(comfy.supported_models.SDXL(settings), device=torch.device("cpu"))
    return comfy.model_patcher.CoreModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def test_sdxl(adapter: Any, subject: Any) -> None:
    with pytest.raises(ValueError, match=r"model is SDXL; .*works with SD1\.5 checkpoints only.*Load an SD1\.5"):
        apply(sdxl(), adapter, subject)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({**TINY, "cross_attention_dim": 96}, r"text embeddings of size 96; .* for size 64"),
        ({**TINY, "block_out_channels": [32, 64, 96, 96]}, r"attention layer 8 has 96 channels, .* has 128"),
    ],
)
def test_a_model_of_other_sizes(adapter: Any, subject: Any, unet: dict[str, Any], message: str) -> None:
    with pytest.raises(
        ValueError, match=f"^model is SD15.*{message}.* Choose what belongs together: an SD1.5 checkpoint"
    ):
        apply(tiny_model(unet), adapter, subject)


def test_the_model_is_not_patched_after_a_refusal(model: Any, adapter: Any, subject: Any) -> None:
    with pytest.raises(ValueError, match=r"^start_percent 0\.7 is after end_percent 0\.3"):
        apply(model, adapter, subject, start_percent=0.7, end_percent=0.3)
    assert model.get_attachment("moma") is None and not model.wrappers


def test_a_subject_of_another_adapter(model: Any, adapter: Any, subject: Any) -> None:
    with pytest.raises(ValueError, match=r"^subject was extracted with another adapter \(abc\).*attn_adapters_proj"):
        apply(model, adapter, replace(subject, adapter_identity="abc"))


def test_a_broken_region_mask(model: Any, adapter: Any, subject: Any) -> None:
    for region in (torch.zeros(0, 4, 4), torch.full((1, 4, 4), torch.nan)):
        with pytest.raises(ValueError, match="^region_mask is empty or holds NaN"):
            apply(model, adapter, subject, region_mask=region)


def test_no_picture(mllm: Any, adapter: Any) -> None:
    """Of Load MoMA Checkpoint with a whole checkpoint and no image connected."""
    with pytest.raises(ValueError, match=r"^image has no picture: .*Unmute the Load Image before it.*Ctrl\+M"):
        ExtractSubject.execute(mllm, adapter, None, "cup", "A cup.", "squash")


def test_a_vae_that_gives_nan(model: Any, adapter: Any, subject: Any) -> None:
    with pytest.raises(ValueError, match=r"^vae gave a latent of shape \(1, 4, 8, 8\).*--fp32-vae"):
        SelfAttnShortcut.execute(model, adapter, subject, tiny_vae(scale=torch.nan), None, 1.0, 0.0, 1.0, 0)


def test_multigpu_is_refused(model: Any, adapter: Any, subject: Any) -> None:
    patched = moma(model, adapter, subject)
    patched.set_additional_models("multigpu", [model.clone()])
    with pytest.raises(ValueError, match="MoMA does not work with MultiGPU work units"):
        sample(patched, positive(subject), negative())


def test_the_mask_node_needs_the_model_and_latent_of_a_run(
    model: Any, adapter: Any, subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    with pytest.raises(
        ValueError, match="^model has no MoMA on it: .* bypassed or muted.* bypass MoMA Subject Mask too"
    ):
        SubjectMask.execute(model, {"samples": torch.zeros(1, 4, 8, 8)})
    patched = moma(model, adapter, subject)
    with pytest.raises(
        ValueError,
        match="^latent is not the result of a sampler that ran with this model.*`output`, not `denoised_output`",
    ):
        SubjectMask.execute(patched, {"samples": torch.zeros(1, 4, 8, 8)})
    samples = sample(patched, positive(subject), negative())
    with pytest.raises(
        ValueError, match="^subject 'dog' is not one of the subjects of this model: .*or leave `subject` unconnected"
    ):
        SubjectMask.execute(patched, {"samples": samples}, tiny_subject(adapter, "dog"))
    dog = tiny_subject(adapter, "dog", seed=6)
    with pytest.raises(ValueError, match="^subject 'dog' was not in the run that made this latent: connect"):
        SubjectMask.execute(moma(patched, adapter, dog), {"samples": samples}, dog)
    output = SubjectMask.execute(patched, {"samples": samples}, subject)
    mask, evolution = output.args
    assert mask.shape == (1, 64, 64) and evolution.shape[0] == 1 and evolution.std() > 0
    assert len(output.ui["images"]) == 2


@pytest.fixture(scope="module")
def mllm() -> Any:
    return load_mllm(DATA / "mllm" / "tiny56" / "checkpoint", vision_heads=4)


def extract(mllm: Any, adapter: Any, image: torch.Tensor | None = None, **changes: Any) -> Any:
    image = torch.rand(1, 40, 30, 3, generator=torch.Generator().manual_seed(0)) if image is None else image
    inputs = {"subject": "car", "prompt": "A car.", "fit": "squash", **changes}
    with torch.inference_mode():
        return ExtractSubject.execute(mllm, adapter, image, **inputs).args[0]


def test_extraction_refuses_what_it_cannot_use(mllm: Any, adapter: Any) -> None:
    with pytest.raises(ValueError, match="^subject is empty: give the word"):
        extract(mllm, adapter, subject="  ")
    with pytest.raises(ValueError, match="^subject is empty: give the word"):
        extract(mllm, adapter, subject="\u200b\ufeff")
    with pytest.raises(
        ValueError, match=r"^prompt holds half a character \('\\ud83d', after 'A red '\): the text was cut"
    ):
        extract(mllm, adapter, prompt="A red \ud83d")
    with pytest.raises(ValueError, match="^mask is empty: no pixel is marked"):
        extract(mllm, adapter, mask=torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="^image holds NaN"):
        extract(mllm, adapter, torch.full((1, 8, 8, 3), torch.nan))
    with pytest.raises(ValueError, match=r"^image has shape \(0, 8, 8, 3\); expected"):
        extract(mllm, adapter, torch.zeros(0, 8, 8, 3))
    with pytest.raises(ValueError, match=r"takes hidden states of size 32, but mllm checkpoint has 64"):
        extract(mllm, tiny_adapter(hidden=32))


def test_one_word_however_its_accents_are_stored(mllm: Any, adapter: Any) -> None:
    one, other = (extract(mllm, adapter, subject=word, prompt=word) for word in ("caf\u00e9", "cafe\u0301"))
    assert one.word == other.word and torch.equal(one.embedding, other.embedding)
    assert combine_subjects(one, other).word == "caf\u00e9"


def test_extraction_takes_grey_transparent_and_odd_pictures(mllm: Any, adapter: Any) -> None:
    colour = torch.rand(1, 40, 30, 4)
    colour[..., 3] = (torch.arange(30) < 15).float()
    from_alpha = extract(mllm, adapter, colour)
    assert bool(from_alpha.masks[..., :200].all()) and not bool(from_alpha.masks[..., 300:].any())
    from_mask = extract(mllm, adapter, colour[..., :3], mask=colour[0, :, :, 3])
    assert from_mask.key == from_alpha.key
    assert extract(mllm, adapter, colour[..., :1]).embedding.isfinite().all()


def test_the_embedding_depends_on_picture_word_and_prompt(mllm: Any, adapter: Any) -> None:
    base = extract(mllm, adapter).embedding
    assert torch.equal(extract(mllm, adapter).embedding, base)
    half = torch.zeros(1, 40, 30)
    half[..., :15] = 1
    for other in ({"subject": "dog"}, {"prompt": "A car at sea."}, {"mask": half}):
        assert not torch.allclose(extract(mllm, adapter, **other).embedding, base)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder and an empty folder of subjects."""
    paths = {
        MODELS: ([str(tmp_path / "moma")], {".th", ".safetensors"}),
        SUBJECTS: ([str(tmp_path / "subjects")], {".safetensors"}),
    }
    for key, value in paths.items():
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, value)
        folder_paths.filename_list_cache.pop(key, None)
    (tmp_path / "moma").mkdir()
    (tmp_path / "subjects").mkdir()
    return tmp_path


def test_a_missing_adapter_file(models: Path) -> None:
    message = LoadAdapter.validate_inputs("attn_adapters_projectors.th")
    assert isinstance(message, str)
    for part in ("'attn_adapters_projectors.th'", str(models / "moma"), "Found: nothing", "huggingface.co", "press R"):
        assert part in message
    torch.save(adapter_groups(embedding=8), models / "moma" / "other.th")
    folder_paths.filename_list_cache.pop(MODELS, None)
    assert LoadAdapter.validate_inputs("other.th") is True
    assert "Found: other.th" in str(LoadAdapter.validate_inputs("attn_adapters_projectors.th"))


def test_names_saved_on_another_system_are_found(models: Path) -> None:
    (models / "moma" / "hub").mkdir()
    torch.save(adapter_groups(embedding=8), models / "moma" / "hub" / "adapter.th")
    (models / "moma" / "hub" / "llava").symlink_to(DATA / "mllm" / "tiny56" / "checkpoint")
    assert LoadAdapter.validate_inputs("hub\\adapter.th") is True
    assert LoadMllm.validate_inputs("hub\\llava") is True
    assert "Found: hub/adapter.th" in str(LoadAdapter.validate_inputs("hub/other.th"))


def test_a_missing_mllm_folder(models: Path) -> None:
    message = str(LoadMllm.validate_inputs("MoMA_llava_7b"))
    for part in ("model_name", "'MoMA_llava_7b'", str(models / "moma"), "Found: nothing", "tokenizer.model"):
        assert part in message
    (models / "moma" / "MoMA_llava_7b").symlink_to(DATA / "mllm" / "tiny56" / "checkpoint")
    assert LoadMllm.validate_inputs("MoMA_llava_7b") is True


def test_a_missing_saved_subject(models: Path) -> None:
    message = str(LoadSubject.validate_inputs("car_00001_.safetensors"))
    for part in ("subject_name", "'car_00001_.safetensors'", str(models / "subjects"), "Save MoMA Subject"):
        assert part in message
