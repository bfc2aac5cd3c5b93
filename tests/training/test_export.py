"""The small world's files: loaded by the product and by ComfyUI's classes they do what the trained modules do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.mini.checkpoint import load_mini_checkpoint
from comfyui_moma.moma_modules.mllm.encode import prompt_ids, subject_hidden_state
from comfyui_moma.moma_modules.mllm.loading import load_mllm
from comfyui_moma.training import data, description, diffusion, export, language
from comfyui_moma.training.adapter_weights import TrainableAdapter, first_weights
from comfyui_moma.training.painter import paint
from random_stages import RandomStages
from sentencepiece import SentencePieceProcessor

from workbench.scene import close
from workbench.small_world import ADAPTER, CHECKPOINT, MLLM

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
SCALE = 2.7
SEEN = {"vae": 1, "diffusion": 2, "vision": 5, "language": 3, "adapter": 4}
TEXTS = ["photo of a cup. A cup on the moon.", ""]


class World(RandomStages):
    """Stages with random weights and their files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.adapter = TrainableAdapter(
            first_weights(self.base.unet, description.SIZE, language.language_shape().hidden_size)
        )
        self.adapter.weights.mapping.load_state_dict(self.reader.mapping.state_dict())
        self.folder = folder
        export.export(folder, self.vae, self.base, self.reader, self.adapter, SCALE, SEEN)
        self.model, self.clip, self.loaded_vae = load_mini_checkpoint(folder / CHECKPOINT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_all_files_together_are_small(world: World) -> None:
    sizes = {path.name: path.stat().st_size for path in world.folder.rglob("*") if path.is_file()}
    assert set(sizes) == {
        "moma_mini.safetensors",
        "moma_mini_adapter.safetensors",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "trained.json",
        *(f"{name.replace(' ', '_')}.png" for name in export.EXAMPLES),
    }
    assert sum(sizes.values()) < export.LARGEST


def test_text_is_embedded_as_in_training(world: World) -> None:
    found = torch.cat([world.clip.encode_from_tokens(world.clip.tokenize(text)) for text in TEXTS])
    assert close(found, world.base.encode(TEXTS, CPU), 1e-5)


def test_the_unet_finds_the_noise_that_it_finds_in_training(world: World) -> None:
    import comfy.model_management

    comfy.model_management.load_models_gpu([world.model])
    noisy, steps, context = torch.randn(2, 4, 16, 16), torch.tensor([20, 700]), world.base.encode(TEXTS, CPU)
    sampling = world.model.model.model_sampling
    sigma = sampling.sigmas[steps]
    shown = noisy * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)  # ComfyUI scales it back.
    clean = world.model.model.apply_model(shown, sigma, c_crossattn=context)
    found = ((shown - clean) / sigma.view(-1, 1, 1, 1)).detach()
    assert close(found, world.base(noisy, steps, context), 1e-4)


def test_pictures_become_the_latents_of_training_and_pictures_again(world: World) -> None:
    picture = data.to_tensor(paint(data.scene_of(4))[0])[None]
    stock = world.model.model.latent_format
    latent = world.loaded_vae.encode((picture.movedim(1, -1) + 1) / 2).detach()
    mean = world.vae.encode(picture)
    assert close(stock.process_in(latent), mean * SCALE, 2e-3)
    shown = world.loaded_vae.decode(latent).detach()
    assert close(shown, ((world.vae.decode(mean) + 1) / 2).clamp(0, 1).movedim(1, -1), 2e-3)


def test_the_language_model_says_what_it_says_in_training(world: World) -> None:
    mllm = load_mllm(world.folder / MLLM, "fp32")
    picture, mask = paint(data.scene_of(4))
    hidden = subject_hidden_state(mllm, picture, mask, "cup", "A cup on the moon.")
    tokenizer = SentencePieceProcessor(model_proto=language.tokenizer_file())
    ids = prompt_ids(tokenizer, "cup", "A cup on the moon.")
    expected = world.reader.hidden(language.reference_pixels(picture, np.asarray(mask))[None], [ids])
    assert close(hidden, expected, 1e-4)
    adapter = load_adapter(world.folder / ADAPTER)
    assert close(adapter.map_hidden_state(hidden), world.reader.mapping(expected), 1e-3)


def test_the_model_has_the_layout_that_the_adapter_needs(world: World) -> None:
    from comfyui_moma.moma_modules.sampling.unet import check_model

    check_model(world.model, load_adapter(world.folder / ADAPTER))
    block = world.model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    assert block.n_heads == diffusion.HEADS


def test_training_goes_on_from_the_files(world: World) -> None:
    found = export.read_back(world.folder)
    assert found is not None
    assert found.scale == SCALE
    assert {name: getattr(found, name).seen for name in SEEN} == SEEN
    assert found.vision.weights == {name: found.language.weights[name] for name in found.vision.weights}
    assert {name.split(".")[1] for name in found.vision.weights} == {"vision", "projector"}
    stages = {"vae": world.vae, "diffusion": world.base, "language": world.reader, "adapter": world.adapter}
    for name, module in stages.items():
        start = getattr(found, name)
        state = dict(module.named_parameters())
        assert set(state) <= set(start.weights)
        for key, value in state.items():
            # 16 bits; those of the VAE were also made larger and smaller again.
            assert torch.allclose(start.weights[key], value.detach(), atol=2e-3, rtol=2e-3), key
    assert export.read_back(world.folder / "nowhere") is None


def test_published_gates_are_raised_and_only_they(world: World) -> None:
    from comfyui_moma.moma_modules.adapter.file import read_adapter

    published, trained = read_adapter(world.folder / ADAPTER), world.adapter
    assert published.scales == pytest.approx([export.GAIN * gate for gate in trained.gates.tolist()], rel=1e-3)
    for name, weight in trained.weights.named_parameters():
        assert torch.allclose(published.tensors[name].float(), weight, atol=1e-3, rtol=1e-3), name


def test_weights_that_do_not_fit_16_bits_are_refused(world: World, tmp_path: Path) -> None:
    reader = language.SubjectReader()
    reader.mllm.language.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match="norm.weight' holds values that are not finite in 16 bits"):
        export.export_mllm(tmp_path, reader)


def test_a_picture_of_the_whole_graph_comes_out(world: World) -> None:
    """Any run of ComfyUI's sampler: nothing that these classes need is missing."""
    import comfy.sample

    texts = [[[world.clip.encode_from_tokens(world.clip.tokenize(text)), {}]] for text in TEXTS]
    noise = torch.randn(1, 4, 16, 16)
    run = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    with torch.inference_mode():
        samples = comfy.sample.sample(
            world.model, noise, positive=texts[0], negative=texts[1], latent_image=torch.zeros_like(noise), **run
        )
        assert world.loaded_vae.decode(samples).shape == (1, 128, 128, 3)
