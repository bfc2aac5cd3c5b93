"""The small world's files as the node offers them."""

from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.adapter.loading import adapter_choices, adapter_path
from comfyui_moma.moma_modules.host import folders
from comfyui_moma.moma_modules.mini.checkpoint import FORMAT, TEXT_HEADS, UNET, UNET_HEADS
from comfyui_moma.moma_modules.mini.choices import example_names, load_example, mini_names, mini_path
from comfyui_moma.moma_modules.mllm.loading import mllm_choices, mllm_path
from comfyui_moma.nodes.mini import LoadMini
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def registered() -> None:
    folders.register_folders()


def test_the_packs_own_files_are_offered_like_any_other() -> None:
    assert mini_names() == ["moma_mini.safetensors"]
    assert mini_path("moma_mini.safetensors").parent == folders.OWN_WEIGHTS
    assert "moma_mini_adapter.safetensors" in adapter_choices()
    assert "moma_mini_llava" in mllm_choices()
    assert adapter_path("moma_mini_adapter.safetensors").is_file()
    assert mllm_path("moma_mini_llava").is_dir()


def test_a_users_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**folder_paths.folder_names_and_paths}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    paths, suffixes = known[folders.MODELS]
    known[folders.MODELS] = ([str(tmp_path), *paths], suffixes)
    metadata = {"format": FORMAT, TEXT_HEADS: "4", UNET_HEADS: "2"}
    for name in ("moma_mini.safetensors", "mine.safetensors"):
        save_file({UNET + "weight": torch.zeros(1)}, tmp_path / name, metadata=metadata)
    assert mini_names() == ["mine.safetensors", "moma_mini.safetensors"]
    assert mini_path("moma_mini.safetensors").parent == tmp_path
    assert folders.model_roots()[0] == tmp_path


@pytest.mark.parametrize("name", ["gone.safetensors", "moma_mini_adapter.safetensors", "../moma_mini.safetensors"])
def test_what_is_no_small_checkpoint_is_named_with_a_way_out(name: str) -> None:
    message = LoadMini.validate_inputs(name, "striped cup")
    assert isinstance(message, str)
    assert message.startswith(f"ckpt_name: there is no small checkpoint {name!r}. Searched: ")
    assert message.endswith("Other checkpoints are loaded with Load Checkpoint.")


def test_an_example_is_a_picture_with_the_mask_of_its_subject() -> None:
    assert "striped cup" in example_names()
    for name in example_names():
        image, mask = load_example(name)
        assert image.shape == (1, 128, 128, 3)
        assert mask.shape == (1, 128, 128)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert 0.05 < float(mask.mean()) < 0.5
        ground = image[0][mask[0] == 0]
        plain = (ground - ground.median(dim=0).values).abs().amax(dim=1) < 0.02
        assert float(plain.float().mean()) > 0.95  # Paper, but for the outline's soft edge.
    message = LoadMini.validate_inputs("moma_mini.safetensors", "cat")
    assert isinstance(message, str)
    assert message.startswith("example: there is no picture 'cat', only: checked bag, striped cup")


def test_the_node_gives_models_and_the_example() -> None:
    assert LoadMini.validate_inputs("moma_mini.safetensors", "striped cup") is True
    assert LoadMini.validate_inputs(None, None) is True
    assert LoadMini.fingerprint_inputs("moma_mini.safetensors", "striped cup")
    model, clip, vae, image, mask = LoadMini.execute("moma_mini.safetensors", "striped cup").args
    assert model.get_model_object("latent_format").latent_channels == 4
    assert clip.encode_from_tokens(clip.tokenize("a cup")).shape[1] == 77
    latent = vae.encode(image)
    assert latent.shape == (1, 4, 16, 16)
    assert (vae.decode(latent) - image).abs().mean() < 0.1
    assert mask.shape == (1, 128, 128)
