"""The figures of `moma_batch evaluate` against torchmetrics and the published definitions, on tiny checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from batch.made_run import scene, square, tiny_clip, tiny_dino
from PIL import Image

from moma_batch.evaluate.backbones import load_backbone
from moma_batch.evaluate.copies import Copies
from moma_batch.evaluate.images import LEAST_AROUND, Views, load_picture, mask_figures, views
from moma_batch.evaluate.measure import Measure, Shown, from_text, to_text
from moma_batch.evaluate.samples import Sample
from moma_batch.table import TableError

pytestmark = pytest.mark.newest
CPU = torch.device("cpu")
TEXTS = ["a toy on the beach", "a photo of a dog that wears a very long scarf " * 12]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"clip": tiny_clip(place / "clip"), "dino": tiny_dino(place / "dino"), "dinov2": tiny_dino(place / "v2", 2)}


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of several sizes."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (40 + 8 * i, 64, 3), np.uint8)) for i in range(count)]


def figures(backbone: Any, picture: Image.Image, reference: Image.Image, prompt: str) -> dict[str, float]:
    sample = Sample("a", 1, "ok", prompt=prompt)
    shown = Shown(sample, Views(picture, None, None), Views(reference, None, None), "r", {})
    return Measure(backbone).batch([shown])[0].figures


class _Torchmetrics:
    """CLIP as torchmetrics calls it; newer transformers give it embeddings inside of an object."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = transformers.CLIPModel.from_pretrained(folder)
        sizes = self.model.config.text_config.max_position_embeddings
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=sizes))

    def to(self, device: torch.device) -> "_Torchmetrics":
        return self

    def get_image_features(self, *values: Any) -> torch.Tensor:
        found = self.model.get_image_features(*values)
        return found if isinstance(found, torch.Tensor) else found.pooler_output

    def get_text_features(self, *values: Any) -> torch.Tensor:
        found = self.model.get_text_features(*values)
        return found if isinstance(found, torch.Tensor) else found.pooler_output


def test_clip_figures_are_torchmetrics_without_its_factor(models: dict[str, Path]) -> None:
    """CLIPScore is 100 times the cosine, and 0 where that is negative."""
    from torchmetrics.functional.multimodal import clip_score

    def load() -> tuple[Any, Any]:
        processor = transformers.CLIPProcessor(
            transformers.AutoImageProcessor.from_pretrained(models["clip"]),
            transformers.AutoTokenizer.from_pretrained(models["clip"]),
        )
        return _Torchmetrics(models["clip"]), processor

    backbone = load_backbone("clip", str(models["clip"]), CPU)
    seen = []
    for picture, reference in zip(noise(4), noise(4, 1), strict=True):
        found = figures(backbone, picture, reference, TEXTS[0])
        pixels = [torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in (picture, reference)]
        text, image = (clip_score(pixels[0], other, load) for other in (TEXTS[0], pixels[1]))
        assert max(found["CLIP-T"], 0) == pytest.approx(float(text) / 100, abs=1e-5)
        assert max(found["CLIP-I"], 0) == pytest.approx(float(image) / 100, abs=1e-5)
        seen += [found["CLIP-T"], found["CLIP-I"]]
    assert len({round(value, 4) for value in seen}) == 8


def test_clip_t_is_the_models_own_logit_without_its_scale(models: dict[str, Path]) -> None:
    """Also of a prompt that is longer than CLIP can read."""
    model: Any = transformers.CLIPModel.from_pretrained(models["clip"])
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(models["clip"])
    images: Any = transformers.AutoImageProcessor.from_pretrained(models["clip"])
    backbone = load_backbone("clip", str(models["clip"]), CPU)
    for text in TEXTS:
        (picture,) = noise(1)
        tokens = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
        with torch.inference_mode():
            read = model(**tokens, **images(images=[picture], return_tensors="pt"))
            wanted = float(read.logits_per_image / model.logit_scale.exp())
        assert figures(backbone, picture, picture, text)["CLIP-T"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_is_the_cosine_of_class_tokens(models: dict[str, Path], kind: str) -> None:
    pair = [noise(1, seed)[0] for seed in (0, 1)]
    processor: Any = transformers.AutoImageProcessor.from_pretrained(models[kind])
    model: Any = transformers.AutoModel.from_pretrained(models[kind])
    with torch.inference_mode():
        tokens = model(**processor(images=pair, return_tensors="pt")).last_hidden_state[:, 0]
    wanted = float(torch.cosine_similarity(tokens[0], tokens[1], dim=0))
    backbone = load_backbone(kind, str(models[kind]), CPU)
    found = figures(backbone, *pair, "")
    assert found == {backbone.image_measure: pytest.approx(wanted, abs=1e-5)} and abs(wanted) < 0.999


def test_figures_do_not_depend_on_the_batch(models: dict[str, Path]) -> None:
    backbone = load_backbone("dinov2", str(models["dinov2"]), CPU)
    together = backbone.images(noise(5))
    alone = torch.cat([backbone.images([picture]) for picture in noise(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_backbones_name_says_which_weights(models: dict[str, Path], tmp_path: Path) -> None:
    """The same files elsewhere have the same digest; other preprocessing has another."""
    first = load_backbone("dino", str(models["dino"]), CPU)
    copy = tiny_dino(tmp_path / "copy")
    same = load_backbone("dino", str(copy), CPU)
    assert same.about["sha256"] == first.about["sha256"] and same.name == f"copy {first.about['sha256'][:8]}"
    settings = copy / "preprocessor_config.json"
    settings.write_text(settings.read_text("utf-8").replace("0.5", "0.4"), encoding="utf-8")
    assert load_backbone("dino", str(copy), CPU).about["sha256"] != first.about["sha256"]


def test_a_model_in_the_hubs_cache_is_found_by_name(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its revision, and without the network."""
    import huggingface_hub.constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--some--dino"
    tiny_dino(place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_backbone("dino", "some/dino", CPU)
    assert found.about["revision"] == revision and found.name.startswith("dino ")
    with pytest.raises(TableError, match=r"--dino some/other is neither a folder nor in the hub's cache .*--dino none"):
        load_backbone("dino", "some/other", CPU)


def test_a_model_of_another_kind_or_a_torn_one_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"--clip .*dino is a model of the type 'vit', expected 'clip'"):
        load_backbone("clip", str(models["dino"]), CPU)
    with pytest.raises(TableError, match="holds no model of transformers'"):
        load_backbone("dino", str(tmp_path), CPU)
    torn = tiny_dino(tmp_path / "torn")
    (torn / "model.safetensors").unlink()
    with pytest.raises(TableError, match=r"--dino .*torn: .* cannot be loaded"):
        load_backbone("dino", str(torn), CPU)


def corner(side: int, top: int, left: int, size: int) -> np.ndarray[Any, Any]:
    """A square that lacks a quarter: its box holds more than it."""
    mask = square(side, top, left, size)
    mask[top : top + size // 2, left : left + size // 2] = False
    return mask


def test_the_subject_is_alone_on_white_wherever_it_is() -> None:
    """Place, background and size of the picture do not matter; what is around it has neither it nor its outline."""
    red, places = (200, 10, 10), (corner(64, 8, 30, 20), corner(128, 60, 4, 40))
    cut = [views(scene(red, around, mask), mask) for around, mask in zip(((0, 90, 0), (9, 9, 90)), places, strict=True)]
    sized = [np.asarray(one.subject.resize((44, 44), 0)) for one in cut if one.subject is not None]
    assert np.array_equal(*sized) and set(map(tuple, sized[0].reshape(-1, 3))) == {red, (255, 255, 255)}
    assert cut[0].around is not None and set(map(tuple, np.asarray(cut[0].around).reshape(-1, 3))) == {(0, 90, 0)}


def test_a_picture_without_subject_or_background_says_so() -> None:
    picture = scene((1, 2, 3), (4, 5, 6))
    nothing = views(picture, np.zeros((64, 64), bool))
    assert nothing.subject is not None and np.asarray(nothing.subject).min() == 255
    assert np.array_equal(np.asarray(nothing.around), picture)
    full = square(64, 1, 1, 62)
    assert (1 - full.mean()) < LEAST_AROUND and views(picture, full).around is None
    assert views(picture, None) == Views(views(picture, None).whole, None, None)


def test_transparency_is_a_mask_in_both_habits(tmp_path: Path) -> None:
    for name, inside in (("cutout", 255), ("painted", 0)):
        alpha = np.where(square(), np.uint8(inside), np.uint8(255 - inside))
        Image.fromarray(np.dstack([scene((9, 9, 9), (1, 1, 1)), alpha])).save(tmp_path / f"{name}.png")
        mask = load_picture(tmp_path / f"{name}.png")[1]
        assert mask is not None and np.array_equal(mask, square())


def test_mask_figures() -> None:
    mask, true = square(64, 16, 16, 32), square(64, 16, 24, 32)
    assert mask_figures(mask, true) == {"mask area": 0.25, "mask in one piece": 1.0, "mask IoU": pytest.approx(24 / 40)}
    two = mask | square(64, 56, 56, 8)
    assert mask_figures(two, None)["mask in one piece"] == pytest.approx(1024 / 1088)
    assert mask_figures(np.zeros((8, 8), bool), None) == {"mask area": 0.0, "mask in one piece": 0.0}


def copies_of(pictures: Sequence[tuple[str, np.ndarray[Any, Any]]], references: dict[str, Any]) -> list[float | None]:
    found = Copies(references)
    found.add(pictures)
    return [found.of(*picture) for picture in pictures]


def test_the_copy_check_is_the_interaction_of_pictures_and_references() -> None:
    """As by its definition, over all pairs, one by one."""
    rng = np.random.default_rng(0)

    def unit() -> Any:
        vector = rng.normal(size=6)
        return vector / np.linalg.norm(vector)

    references = {name: unit() for name in "abc"}
    pictures = [(name, unit()) for name in "aabcc"]
    for (own, picture), found in zip(pictures, copies_of(pictures, references), strict=True):
        rest = [picture @ references[r] for r in references if r != own]
        strangers = [p @ references[own] for other, p in pictures if other != own]
        apart = [
            p @ references[r] for other, p in pictures if other != own for r in references if r not in (own, other)
        ]
        wanted = picture @ references[own] - np.mean(rest) - np.mean(strangers) + np.mean(apart)
        assert found == pytest.approx(wanted, abs=1e-12)


def test_the_copy_check_needs_three_references() -> None:
    sand, grass = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert copies_of([("a", sand), ("b", grass)], {"a": sand, "b": grass}) == [None, None]


def test_the_copy_check_excuses_what_the_prompt_asked_for_and_what_is_like_all() -> None:
    """All pictures on sand, as a reference is: no copy. Each as its own reference: copies."""
    sand, grass, snow = np.eye(3)
    references = {"a": sand, "b": grass, "c": snow}
    asked = copies_of([("a", sand), ("b", sand), ("c", sand)], references)
    copied = copies_of([("a", sand), ("b", grass), ("c", snow)], references)
    assert asked == [pytest.approx(0)] * 3 and copied == [pytest.approx(1)] * 3


def test_vectors_survive_a_line_of_json() -> None:
    vector = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(0)), dim=0)
    assert np.abs(from_text(to_text(vector)) - vector.numpy()).max() < 1e-4
