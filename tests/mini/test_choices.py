"""Checkpoints, the small world's first, and its pictures, as the node offers them."""

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.adapter.file import RELEASED_REFERENCE_SIZE
from comfyui_moma.moma_modules.adapter.loading import adapter_choices, adapter_path
from comfyui_moma.moma_modules.host import folders
from comfyui_moma.moma_modules.mini.checkpoint import FORMAT, SD15_SIDE, SIDE, TEXT_HEADS, UNET, UNET_HEADS
from comfyui_moma.moma_modules.mini.choices import (
    checkpoint_names,
    checkpoint_path,
    example_names,
    load_example,
    mini_names,
)
from comfyui_moma.moma_modules.mllm.loading import mllm_choices, mllm_path
from comfyui_moma.nodes.mini import LoadMini
from comfyui_source import cache_dir
from safetensors.torch import save_file

from nodes import CheckpointLoaderSimple
from workbench import small_world
from workbench.random_weights import sd15_checkpoint

SMALL = "moma_mini.safetensors"


@pytest.fixture(autouse=True)
def registered() -> None:
    folders.register_folders()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's list of folders, to be changed."""
    known = {**folder_paths.folder_names_and_paths}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    return known


def test_the_packs_own_files_are_offered_like_any_other() -> None:
    assert mini_names() == [folders.OWN_CHECKPOINT]
    assert checkpoint_names()[0] == folders.OWN_CHECKPOINT
    assert checkpoint_path(folders.OWN_CHECKPOINT).parent == folders.OWN_WEIGHTS
    assert folders.OWN_ADAPTER in adapter_choices()
    assert folders.OWN_MLLM in mllm_choices()
    assert adapter_path(folders.OWN_ADAPTER).is_file()
    assert mllm_path(folders.OWN_MLLM).is_dir()
    own = (folders.OWN_CHECKPOINT, folders.OWN_MLLM, folders.OWN_ADAPTER)
    assert own == (small_world.CHECKPOINT, small_world.MLLM, small_world.ADAPTER)


def test_a_users_folder_comes_first(tmp_path: Path, listed: Any) -> None:
    paths, suffixes = listed[folders.MODELS]
    listed[folders.MODELS] = ([str(tmp_path), *paths], suffixes)
    metadata = {"format": FORMAT, TEXT_HEADS: "4", UNET_HEADS: "2"}
    for name in ("moma_mini.safetensors", "mine.safetensors"):
        save_file({UNET + "weight": torch.zeros(1)}, tmp_path / name, metadata=metadata)
    assert mini_names() == ["mine.safetensors", "moma_mini.safetensors"]
    assert checkpoint_path(SMALL).parent == tmp_path
    assert folders.model_roots()[0] == tmp_path


def test_comfyuis_checkpoints_come_after_the_small_ones(tmp_path: Path, listed: Any) -> None:
    """In folders too; a small one may lie among them and is then loaded as one."""
    listed["checkpoints"] = ([str(tmp_path)], {".safetensors", ".ckpt"})
    (tmp_path / "realistic").mkdir()
    for name in ("a.ckpt", "realistic/v4.safetensors", "notes.txt", SMALL):
        (tmp_path / name).touch()
    assert checkpoint_names() == [SMALL, "a.ckpt", "realistic/v4.safetensors"]
    assert checkpoint_path("realistic/v4.safetensors") == tmp_path / "realistic" / "v4.safetensors"
    assert checkpoint_path(SMALL).parent == folders.OWN_WEIGHTS
    (tmp_path / "small.safetensors").symlink_to(folders.OWN_WEIGHTS / SMALL)
    *_, image, _, size = LoadMini.execute("small.safetensors", "striped cup").args
    assert image is not None and size == SIDE


@pytest.mark.parametrize("name", ["gone.safetensors", "moma_mini_adapter.safetensors", "../moma_mini.safetensors"])
def test_what_is_no_checkpoint_is_named_with_a_way_out(name: str) -> None:
    message = LoadMini.validate_inputs(name, "striped cup")
    assert isinstance(message, str)
    assert message.startswith(f"ckpt_name: there is no checkpoint {name!r}. Searched: ")
    assert "put an SD1.5 checkpoint there and press R" in message


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
    message = LoadMini.validate_inputs(SMALL, "cat")
    assert isinstance(message, str)
    assert message.startswith("example: there is no picture 'cat', only: checked bag, striped cup")


def test_the_node_gives_models_and_the_example() -> None:
    assert LoadMini.validate_inputs(SMALL, "striped cup") is True
    assert LoadMini.validate_inputs(None, None) is True
    assert LoadMini.fingerprint_inputs(SMALL, "striped cup")
    model, clip, vae, image, mask, size = LoadMini.execute(SMALL, "striped cup").args
    assert model.get_model_object("latent_format").latent_channels == 4
    assert clip.encode_from_tokens(clip.tokenize("a cup")).shape[1] == 77
    latent = vae.encode(image)
    assert latent.shape == (1, 4, 16, 16)
    assert (vae.decode(latent) - image).abs().mean() < 0.1
    assert mask.shape == (1, 128, 128)
    assert size == SIDE == image.shape[1]


def test_a_connected_picture_is_handed_on_and_never_with_the_examples_mask() -> None:
    picture, painted = torch.rand(2, 48, 64, 3), torch.rand(1, 48, 64)
    *_, image, mask, _ = LoadMini.execute(SMALL, "striped cup", picture, painted).args
    assert image is picture and mask is painted
    *_, image, mask, _ = LoadMini.execute(SMALL, "striped cup", picture).args
    assert image is picture
    assert mask.shape == (2, 48, 64) and not mask.any()  # As Load Image gives it where nothing is painted.
    with pytest.raises(ValueError, match="^mask is connected, but image is not: connect the picture"):
        LoadMini.execute(SMALL, "striped cup", mask=painted)


@pytest.mark.slow
def test_any_other_checkpoint_is_loaded_as_comfyui_does(tmp_path: Path, listed: Any) -> None:
    """And has no example: a painted cup would go into a photograph unasked."""
    listed["checkpoints"] = ([str(tmp_path)], {".safetensors"})
    (tmp_path / "sd15.safetensors").symlink_to(sd15_checkpoint(cache_dir()))
    model, clip, vae, image, mask, size = LoadMini.execute("sd15.safetensors", "striped cup").args
    theirs = CheckpointLoaderSimple().load_checkpoint("sd15.safetensors")
    assert [type(part) for part in theirs] == [type(model), type(clip), type(vae)]
    assert type(model.model) is type(theirs[0].model)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(model.model_state_dict()[key].float(), theirs[0].model_state_dict()[key].float())
    assert clip.tokenizer.clip_l.embedding_directory == theirs[1].tokenizer.clip_l.embedding_directory
    assert (image, mask) == (None, None)
    assert size == SD15_SIDE == RELEASED_REFERENCE_SIZE
    picture = torch.rand(1, 48, 64, 3)
    *_, image, _, _ = LoadMini.execute("sd15.safetensors", "striped cup", picture).args
    assert image is picture
