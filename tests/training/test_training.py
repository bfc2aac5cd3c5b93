"""The small world and the loop that trains on it."""

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_moma.training import data, description, diffusion, language, vae, vision, words
from comfyui_moma.training.latents import SPREAD, Latents
from comfyui_moma.training.loop import Plan, Start, Training, samples_seen
from comfyui_moma.training.painter import paint
from comfyui_moma.training.shapes import pair_loss, pair_noise, pair_steps, shape_pair, with_shape
from comfyui_moma.training.world import CLASSES, HELD_OUT_PLACES, MATERIALS, PLACES, draw_scene, draw_subject

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CLASSES)
def test_a_scene_is_painted_alike_each_time_and_its_mask_lies_on_the_subject(name: str) -> None:
    rng = random.Random(3)
    scene = draw_scene(rng, draw_subject(rng, name), "moon")
    picture, mask = paint(scene)
    again, _ = paint(scene)
    assert np.array_equal(picture, again)
    assert picture.shape == (128, 128, 3)
    assert 0.08 < mask.mean() < 0.5
    elsewhere = draw_scene(random.Random(9), scene.subject, "moon")
    assert not np.array_equal(paint(elsewhere)[1], mask)


def test_a_subject_keeps_its_colours_from_place_to_place_and_loses_them_to_a_material() -> None:
    rng = random.Random(5)
    subject = draw_subject(rng, "bag")
    body = np.array(subject.colours[0])

    def share_of_body(place: str, material: str | None) -> float:
        picture, mask = paint(draw_scene(rng, subject, place, material))
        return float((np.abs(picture[mask].astype(int) - body).sum(axis=1) < 12).mean())

    assert min(share_of_body(place, None) for place in PLACES) > 0.2
    assert max(share_of_body("moon", material) for material in MATERIALS) < 0.05


def test_training_sees_no_held_out_subject_and_no_held_out_pair() -> None:
    scenes = [data.scene_of(number) for number in range(3000)]
    assert not any(scene.subject.held_out for scene in scenes)
    assert not any(scene.place == HELD_OUT_PLACES[scene.subject.name] for scene in scenes)
    assert all(data.scene_of(2 * i).subject == data.scene_of(2 * i + 1).subject for i in range(50))
    assert not any(data.scene_of(2 * i).material for i in range(200))  # A reference shows the subject as it is.
    assert {scene.place for scene in scenes} == {None, *PLACES}
    held_out = draw_subject(random.Random(1), "cup", held_out=True)
    assert held_out.held_out and held_out.kind not in {scene.subject.kind for scene in scenes}


def test_a_caption_names_the_class_the_place_and_the_material() -> None:
    rng = random.Random(2)
    bare = 0
    for number in range(300):
        scene = data.scene_of(number)
        text = words.caption(scene, rng).lower()
        assert any(word in text for word in words.SYNONYMS[scene.subject.name])
        if text in words.SYNONYMS[scene.subject.name]:
            bare += 1
            continue
        for name, ways in words.PLACE_WORDS.items():
            assert any(f" {way}" in text for way in ways) == (scene.place == name), (text, scene)
        for name, ways in words.MATERIAL_WORDS.items():
            assert any(f" {way}" in text for way in ways) == (scene.material == name), (text, scene)
    assert 0 < bare < 60


def test_a_shape_is_said_before_the_word_where_it_is_not_medium() -> None:
    told = {0.1: 0, 0.9: 1, 0.5: None}
    for number in range(200):
        scene = data.scene_of(number)
        name = scene.subject.name
        for first in told:
            shown = with_shape(scene, (first, 0.9))
            text = words.caption(shown, random.Random(number), shaped_share=1).lower()
            if text in words.SYNONYMS[name]:
                continue
            said = [word for word in words.SHAPE_WORDS[name][0] if re.search(rf"\b{word} ", text)]
            assert said == ([] if told[first] is None else [words.SHAPE_WORDS[name][0][told[first]]]), text
            assert re.search(rf"{words.SHAPE_WORDS[name][1][1]} .*\b({'|'.join(words.SYNONYMS[name])})\b", text), text
            assert not scene.material or any(way in text for way in words.MATERIAL_WORDS[scene.material]), text


def test_a_pair_of_shapes_is_one_scene_that_training_may_see() -> None:
    for i in range(100):
        one, other = shape_pair(random.Random(i))
        assert with_shape(one, other.subject.shape) == other
        apart = [abs(a - b) for a, b in zip(one.subject.shape, other.subject.shape, strict=True)]
        assert max(apart) >= 0.5 and all(distance == 0 or distance >= 0.5 for distance in apart)
        assert not one.subject.held_out and one.place != HELD_OUT_PLACES[one.subject.name]


def test_a_pair_has_one_noise_and_counts_the_picture_s_errors_where_it_differs() -> None:
    clean = torch.zeros(4, 4, 8, 8)
    clean[0, :, :4], clean[3, :, :, :2] = 1, 1
    noise, steps = pair_noise(clean), pair_steps(2)
    assert torch.equal(noise[::2], noise[1::2]) and not torch.equal(noise[0], noise[2])
    assert torch.equal(steps[::2], steps[1::2]) and int(steps.min()) >= 600
    where = {}
    for name, place in (("differs", (0, slice(None), slice(0, 4))), ("same", (0, slice(None), slice(4, 8)))):
        errors = torch.zeros_like(clean)
        errors[place] = 1
        where[name] = [float(pair_loss(errors, clean, torch.full((4,), share))) for share in (0.5, 0.1, 0.01)]
    assert where["differs"][0] == pytest.approx(2.1 / 8) and where["same"][0] == pytest.approx(0.1 / 8)
    assert where["differs"][1] == pytest.approx(9 * where["differs"][0], rel=1e-5)
    assert where["differs"][2] == pytest.approx(20 * where["differs"][0], rel=1e-5), "no more than that"


class _Line(torch.nn.Module):
    """The smallest thing that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1)


def _trained(folder: Path, samples: int, until: int | None = None, muon: float | None = None) -> Any:
    """Train on noise that depends on the step; with `until`, die there after a save."""
    torch.manual_seed(1)
    training = Training(_Line(), Plan(samples=samples, batch=4, rate=0.1, warm_up=3, muon=muon), folder, CPU)

    def loss_of(seen: int) -> torch.Tensor:
        if seen == until:
            training.save()
            raise KeyboardInterrupt
        inputs = torch.randn(4, 3)
        return (training.module.line(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

    training.run(loss_of, lambda: None)
    return training


@pytest.mark.parametrize("muon", [None, 0.1])
def test_a_stage_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, muon: float | None) -> None:
    whole = _trained(tmp_path / "whole", 400, muon=muon)
    with pytest.raises(KeyboardInterrupt):
        _trained(tmp_path / "killed", 400, until=120, muon=muon)
    resumed = _trained(tmp_path / "killed", 400, muon=muon)
    for part in ("line.weight", "line.bias"):
        assert torch.equal(whole.module.state_dict()[part], resumed.module.state_dict()[part])
        assert torch.equal(whole.averaged()[part], resumed.averaged()[part])
    assert (tmp_path / "killed" / "loss.csv").read_text("utf-8").strip()
    assert torch.allclose(whole.module.line.weight, torch.ones(1, 3), atol=0.1)


def test_a_larger_share_goes_on_from_a_smaller_one(tmp_path: Path) -> None:
    first = _trained(tmp_path, 100)
    again = _trained(tmp_path, 100)
    assert torch.equal(first.module.line.weight, again.module.line.weight)
    more = _trained(tmp_path, 200)
    assert (first.seen, more.seen, samples_seen(tmp_path, None)) == (100, 200, 200)
    assert not torch.equal(more.module.line.weight, again.module.line.weight)


def test_a_stage_without_a_state_goes_on_from_published_weights(tmp_path: Path) -> None:
    weights = {"line.weight": torch.ones(1, 3)}
    training = Training(_Line(), Plan(samples=100, batch=4, rate=0.1), tmp_path, CPU, start=Start(weights, 40))
    assert training.seen == samples_seen(tmp_path, Start(weights, 40)) == 40
    assert torch.equal(training.averaged()["line.weight"], torch.ones(1, 3))


def test_the_encoder_stays_while_the_decoder_goes_on(tmp_path: Path) -> None:
    first = vae.train(tmp_path, CPU, Plan(samples=4, batch=4, rate=1e-3), encoder=True)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    after = vae.train(tmp_path, CPU, Plan(samples=8, batch=4, rate=1e-3), encoder=False).state_dict()
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder"}


def test_a_rate_rises_stays_and_falls() -> None:
    plan = Plan(samples=1000, batch=10, rate=1.0, warm_up=10, cooling=0.5)
    assert [round(plan.rate_at(seen), 2) for seen in (0, 90, 500, 750, 1000)] == [0.1, 1.0, 1.0, 0.5, 0.0]


def test_a_step_of_the_autoencoder_reaches_every_weight() -> None:
    model = vae.build()
    pictures = torch.stack([data.to_tensor(paint(data.scene_of(n))[0]) for n in range(2)])[..., :64, :64]
    latents = model.encode(pictures)
    assert latents.shape == (2, 4, 8, 8)
    result = model.decode(latents)
    assert result.shape == pictures.shape
    result.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_a_step_of_the_diffusion_model_reaches_every_weight() -> None:
    model = diffusion.TextToImage()
    for name, part in model.unet.named_modules():
        if name.endswith(("proj_out", "out_layers.3")) or name == "out.2":
            torch.nn.init.normal_(part.weight, std=0.1)  # They start at 0, and keep gradients from what lies before.
    texts = ["photo of a cup. A cup on the moon.", ""]
    noise = torch.randn(2, 4, 16, 16)
    guess = model(noise, torch.tensor([10, 900]), model.encode(texts, CPU))
    (guess - noise).square().mean().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not lacking


def test_the_schedule_is_the_stock_one() -> None:
    import comfy.model_sampling

    stock = comfy.model_sampling.ModelSamplingDiscrete()
    shares = diffusion.signal_shares()
    assert torch.allclose(((1 - shares) / shares).sqrt(), stock.sigmas, rtol=1e-4)
    steps = torch.tensor([0, 400, 999])
    clean, noise = torch.ones(3, 4, 2, 2), torch.full((3, 4, 2, 2), 2.0)
    scaled = diffusion.noised(clean, steps, noise) / shares[steps].sqrt().view(-1, 1, 1, 1)
    sigmas = stock.sigmas[steps].view(-1, 1, 1, 1)
    assert torch.allclose(scaled, clean + sigmas * noise, rtol=1e-4)


def test_a_description_tells_what_is_seen_and_nothing_of_colours_under_a_material() -> None:
    rng = random.Random(4)
    subject, other = draw_subject(rng, "cup"), draw_subject(rng, "cup")
    one, two = (
        description.described(draw_scene(random.Random(1), thing, "moon", "wood"))
        for thing in (subject, replace(other, shape=subject.shape))
    )
    assert torch.equal(one, two)
    seen = description.described(draw_scene(rng, subject, "moon"))
    assert seen.shape == (description.SIZE,)
    assert seen.abs().max() <= 1
    differing = {name: replace(subject, **{name: getattr(other, name)}) for name in ("colours", "shape")}
    for thing in (*differing.values(), draw_subject(rng, "car"), replace(subject, count=5 - subject.count)):
        assert not torch.equal(seen, description.described(draw_scene(rng, thing, "moon")))
    assert not torch.equal(seen, description.described(draw_scene(rng, subject, "snow")))


def test_a_step_of_the_language_model_reaches_every_weight_and_reads_picture_word_and_prompt() -> None:
    from sentencepiece import SentencePieceProcessor

    torch.manual_seed(0)
    model = language.SubjectReader()
    tokenizer = SentencePieceProcessor(model_proto=language.tokenizer_file())
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    pixels = [language.reference_pixels(*paint(data.scene_of(number))) for number in (0, 2)]
    asked = [("cup", "A cup on the moon."), ("cup", "A cup in a forest."), ("mug", "A cup on the moon.")]
    ids = [language.prompt_ids(tokenizer, *words_) for words_ in asked]
    with torch.no_grad():
        first, other_prompt, other_word = model(torch.stack([pixels[0]] * 3), ids)
        alone = model(pixels[0][None], ids[:1])[0]
        other_picture = model(pixels[1][None], ids[:1])[0]
    assert torch.allclose(first, alone, atol=1e-5)  # Padding of a batch is not seen.
    for other in (other_prompt, other_word, other_picture):
        assert float((first - other).norm() / first.norm()) > 1e-4
    model(torch.stack(pixels), ids[:2]).square().mean().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not lacking, lacking


def test_the_vision_tower_learns_alone_and_the_language_model_begins_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    seeing = vision.Seeing()
    pixels = torch.stack([language.reference_pixels(*paint(data.scene_of(number))) for number in (0, 2)])
    seen = seeing(pixels)
    assert seen.shape == (2, description.SIZE)
    seen.square().mean().backward()
    reached = {name for name, weight in seeing.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached == {name for name, _ in seeing.named_parameters() if not name.startswith("mllm.language.")}
    plan = Plan(samples=4, batch=2, rate=1e-2, warm_up=1)
    tower = vision.train(tmp_path / "vision", CPU, plan)
    assert {name.rpartition(".")[0].split(".")[1] for name in tower} == {"vision", "projector"}
    begun = language.train(
        tmp_path / "language", CPU, Plan(samples=0, batch=2, rate=1e-3), Start(tower, 0)
    ).state_dict()
    assert all(torch.equal(begun[name], value) for name, value in tower.items())
    torch.manual_seed(0)
    drawn = vision.Seeing().state_dict()
    assert not any(torch.equal(drawn[name], value) for name, value in tower.items() if name.endswith("proj.weight"))


def test_what_is_seen_of_a_reference_counts_by_what_it_is() -> None:
    counts, place = description.weights(), description.part_of("place")
    assert counts.shape == (description.SIZE,)
    somewhere, elsewhere = (
        description.described(draw_scene(random.Random(1), draw_subject(random.Random(2)), where))
        for where in ("moon", "snow")
    )
    assert {int(i) for i in (somewhere != elsewhere).nonzero()} <= set(range(place.start, place.stop))
    round_, square = (replace(draw_subject(random.Random(2)), shape=shape) for shape in ((0.1, 0.2), (0.9, 0.7)))
    one, other = (description.described(draw_scene(random.Random(1), thing, "moon")) for thing in (round_, square))
    assert counts[one != other].tolist() == [description.SHAPE_WEIGHT] * 2
    assert counts[one == other].unique().tolist() == [1.0]


def test_latents_are_encoded_once_and_fewer_may_be_wanted_later(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vae.build().eval()
    latents = Latents(tmp_path / "latents.f16", 70)
    latents.encode(model, CPU)
    assert len(latents) == 70
    everything = latents.take(torch.arange(70))
    assert abs(float(everything.std()) - SPREAD) < 0.05
    again = Latents(tmp_path / "latents.f16", 70)
    again.encode(None, CPU)  # Nothing is missing.
    assert torch.equal(again.take(torch.arange(70)), everything)
    assert len(Latents(tmp_path / "latents.f16", 10)) == 10
