"""The adapter's training: what it runs is what the product runs, and it reaches what it should and nothing else."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_moma.moma_modules.adapter.file import read_adapter
from comfyui_moma.moma_modules.adapter.loading import load_adapter
from comfyui_moma.moma_modules.mllm.encode import IMAGE_TOKEN
from comfyui_moma.moma_modules.subject.subject import Subject
from comfyui_moma.training import adapter_stage, data, diffusion, export, language, loop, small_adapter, validation
from comfyui_moma.training.adapter_stage import Factors, FrozenUnet, Samples, factors_of
from comfyui_moma.training.adapter_weights import TrainableAdapter, first_weights, save_adapter
from comfyui_moma.training.diffusion import signal_shares
from comfyui_moma.training.loop import Plan, Training
from comfyui_moma.training.words import MATERIAL_WORDS, SHAPE_WORDS
from random_stages import RandomStages, random_latents

from workbench import ROOT
from workbench.scene import CONTEXT, WORD_TOKENS, close, moma, negative, positive, sample, tiny_shortcut
from workbench.small_world import ADAPTER
from workbench.tiny_models import seeded, tiny_model

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
EMBEDDING, HIDDEN = 24, 40


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_model().model.diffusion_model


def _adapter(unet: Any, gate: float | None = None, with_mapping: bool = True) -> TrainableAdapter:
    torch.manual_seed(3)
    adapter = TrainableAdapter(first_weights(unet, EMBEDDING, HIDDEN), with_mapping)
    if gate is not None:
        torch.nn.init.constant_(adapter.gates, gate)
    return adapter


def _samples(rows: int = 3, strength: float = 1.0) -> Samples:
    masks = torch.zeros(rows, 16, 16)
    masks[:, :12, :9] = 1.0  # Also at 2x2 there are several places in it.
    return Samples(
        clean=seeded(1, "clean", (rows, 4, 16, 16)),
        masks=masks,
        texts=seeded(1, "texts", (rows, 77, CONTEXT)),
        hidden=seeded(1, "hidden", (rows, HIDDEN)),
        references=seeded(1, "references", (rows, 4, 16, 16)),
        reference_masks=torch.nn.functional.interpolate(masks[:, None], size=(128, 128))[:, 0] > 0,
        words=seeded(1, "words", (rows, 77, CONTEXT)),
        strengths=torch.full((rows,), strength),
    )


def _frozen(unet: Any, saving_memory: bool = False) -> FrozenUnet:
    return FrozenUnet(unet, signal_shares(), torch.float32, saving_memory)


def _loss(adapter: TrainableAdapter, frozen: FrozenUnet, rows: int = 3) -> torch.Tensor:
    torch.manual_seed(7)
    steps = torch.tensor([100, 500, 900])[:rows]
    return adapter_stage.loss_of(frozen, adapter, _samples(rows), steps, torch.zeros(1, 77, CONTEXT))


def test_a_step_reaches_every_trained_tensor_and_no_frozen_one(unet: Any) -> None:
    adapter = _adapter(unet)
    _loss(adapter, _frozen(unet)).backward()
    lacking = [name for name, weight in adapter.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not lacking
    assert all(weight.grad is None for weight in unet.parameters())
    without = _adapter(unet, with_mapping=False)
    _loss(without, _frozen(unet)).backward()
    assert all(weight.grad is None for weight in without.weights.mapping.parameters())
    assert without.gates.grad is not None and without.gates.grad.all()


def test_computing_activations_again_changes_no_gradient(unet: Any) -> None:
    kept, again = _adapter(unet), _adapter(unet)
    losses = [_loss(kept, _frozen(unet)), _loss(again, _frozen(unet, saving_memory=True))]
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for name, weight in kept.named_parameters():
        assert close(again.get_parameter(name).grad, weight.grad, 1e-4), name


def test_frozen_weights_in_16_bits_give_gradients_in_32(unet: Any) -> None:
    adapter, halved = _adapter(unet), tiny_model(dtype=torch.bfloat16).model.diffusion_model
    frozen = FrozenUnet(halved, signal_shares(), torch.bfloat16, saving_memory=True)
    loss = _loss(adapter, frozen)
    assert torch.allclose(loss, _loss(adapter, _frozen(unet)), rtol=0.02)
    loss.backward()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.any() for weight in adapter.parameters())
    assert {weight.dtype for weight in halved.parameters()} == {torch.bfloat16}


def test_a_trained_file_gives_in_a_run_what_training_computed(unet: Any, tmp_path: Path) -> None:
    """Both rows of a run, the negative one too: its embedding is 0, its shortcut is on."""
    adapter = _adapter(unet)
    adapter.gates.data.copy_(torch.linspace(0.2, 1.2, 16))
    path = save_adapter(adapter.state_dict(), tmp_path, 64, torch.float32)
    model, loaded = tiny_model(), load_adapter(path)
    hidden, shortcut = seeded(1, "hidden", (1, HIDDEN)), tiny_shortcut()
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 8:40, 16:56] = True
    picture = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    subject = Subject(loaded.map_hidden_state(hidden), "car", "A car.", picture, mask, loaded.identity)
    texts = positive(subject, tokens=WORD_TOKENS), negative()
    patched = moma(model, loaded, subject, shortcut=shortcut)
    samples = sample(patched, *texts, steps=1, sampler="euler", scheduler="normal", denoise=0.5)
    # One evaluation, without a mask yet, from the noise level in the middle to none.
    import comfy.samplers

    sampling, scale = model.model.model_sampling, 0.18215
    sigma = comfy.samplers.calculate_sigmas(sampling, "normal", 2)[-2]
    latent = 0.3 * seeded(1, "latent", (1, 4, 8, 8)) * scale
    noisy = latent + sigma * seeded(1, "noise", (1, 4, 8, 8))
    frozen = _frozen(model.model.diffusion_model)
    with torch.no_grad():
        both = [torch.cat([part[0][0] for part in texts]), torch.cat([shortcut.text] * 2)]
        seen = frozen.look(
            torch.cat([shortcut.latent * scale] * 2), torch.cat([shortcut.noise] * 2), both[1], torch.cat([mask] * 2)
        )
        embeddings = torch.cat([adapter.embedding(hidden), torch.zeros(1, EMBEDDING)])
        steps = torch.cat([sampling.timestep(sigma)[None]] * 2).float()
        everywhere = torch.ones(2, 8, 8)
        shown = torch.cat([noisy / (1 + sigma**2).sqrt()] * 2)
        found, other = frozen.noise_in(
            adapter, shown, steps, both[0], embeddings, seen, Factors(everywhere, everywhere)
        )
        guided = other + 7.5 * (found - other)
        expected = (noisy - sigma * guided) / scale
        plain = sample(model, *texts, steps=1, sampler="euler", scheduler="normal", denoise=0.5)
    assert close(samples, expected, 1e-5)
    assert not close(plain, expected, 1e-3)


def test_a_row_sees_its_own_reference_only(unet: Any) -> None:
    adapter, frozen, samples = _adapter(unet, gate=1.0), _frozen(unet), _samples()
    texts, steps = samples.texts, torch.tensor([100, 500, 900])
    factors = Factors(samples.masks, samples.masks)

    def run(references: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            seen = frozen.look(references, torch.zeros_like(references), samples.words, samples.reference_masks)
            embeddings = adapter.embedding(samples.hidden)
            return frozen.noise_in(adapter, samples.clean, steps, texts, embeddings, seen, factors)

    changed = samples.references.clone()
    changed[1] += 1.0
    before, after = run(samples.references), run(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_the_parts_act_in_training_where_they_act_in_a_run() -> None:
    masks, strengths = torch.full((5, 2, 2), 0.5), torch.tensor([1.0, 0.4, 1.0, 1.0, 1.0])
    steps = torch.tensor([100, 100, 960, 990, 100])
    no_mask, no_shortcut = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.0]), torch.full((5,), 0.9)
    factors = factors_of(masks, strengths, steps, no_mask, no_shortcut)
    assert factors.cross[:, 0, 0].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert torch.allclose(factors.own[:, 0, 0], torch.tensor([0.5, 0.2, 0.0, 0.0, 1.0]))
    assert not factors_of(masks, strengths, steps, no_mask, torch.zeros(5)).own.any()


def test_both_forms_of_a_trained_file_are_one_adapter_and_say_the_size_of_references(unet: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = save_adapter(_adapter(unet).state_dict(), tmp_path, 128, torch.float16)
    pickled = tmp_path / "attn_adapters_projectors.th"
    assert read_adapter(path).identity == read_adapter(pickled).identity
    groups = torch.load(pickled, weights_only=True)
    assert groups["reference_size"].tolist() == [128.0]
    assert set(groups) == {"projectors", "self_cross_attentions", "llm_mapping", "reference_size"}
    assert {value.dtype for value in groups["projectors"].values()} == {torch.float16}
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("reference_size").tolist() == [128.0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.stem + end for end in (".safetensors", ".th")]


def test_gates_have_a_rate_of_their_own_and_frozen_weights_stay(unet: Any, tmp_path: Path) -> None:
    adapter = _adapter(unet, with_mapping=False)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    plan = Plan(samples=3, batch=3, rate=1e-4, warm_up=1, cooling=0.01)
    training = Training(adapter, plan, tmp_path, CPU, {"gates": 100.0})
    training.run(lambda _: _loss(adapter, _frozen(unet)), lambda: None)
    moved = {name: float((value - before[name]).abs().max()) for name, value in adapter.state_dict().items()}
    assert moved["gates"] == pytest.approx(1e-2, rel=0.01)
    assert moved["weights.layers.0.to_k_ip.weight"] == pytest.approx(1e-4, rel=0.05)
    assert not any(value for name, value in moved.items() if "mapping" in name)


def test_a_batch_in_parts_is_the_same_step(tmp_path: Path) -> None:
    def trained(parts: int) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        inputs = torch.arange(24.0).view(8, 3) / 10
        plan = Plan(samples=8, batch=8, rate=0.1, warm_up=1, parts=parts)
        training = Training(module, plan, tmp_path / str(parts), CPU)
        size = 8 // parts
        training.run(lambda seen: module(inputs[seen : seen + size]).square().mean(), lambda: None)
        return module.weight.detach()

    assert torch.allclose(trained(1), trained(4), rtol=1e-5)


@pytest.fixture(scope="module")
def stages() -> RandomStages:
    return RandomStages()


def _trained(stages: RandomStages, folder: Path, until: int = 100) -> dict[str, torch.Tensor]:
    """The small world's last stage for three batches; killed when it asks for batch number `until`."""
    folder.mkdir(exist_ok=True)
    latents = random_latents(folder)
    taken = 0

    class Killing:
        scale = latents.scale

        def __len__(self) -> int:
            return len(latents)

        def take(self, numbers: torch.Tensor) -> torch.Tensor:
            nonlocal taken
            taken += 1
            if taken > 2 * until:  # Each batch takes targets and references.
                raise KeyboardInterrupt
            return latents.take(numbers)

        encoded = latents.encoded

    plan = Plan(samples=24, batch=8, rate=1e-3, warm_up=1)  # Two of eight rows are a pair that differs in shape.
    trained = small_adapter.train(folder, stages.base, stages.reader, Killing(), stages.vae, CPU, plan)
    return trained.state_dict()


def test_the_small_stage_that_was_killed_goes_on_as_if_it_had_not_been(
    stages: RandomStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)  # After each step.
    monkeypatch.setattr(small_adapter, "_show", lambda *_: None)
    whole = _trained(stages, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _trained(stages, tmp_path / "killed", until=1)
    resumed = _trained(stages, tmp_path / "killed")
    assert len((tmp_path / "killed" / "loss.csv").read_text("utf-8").splitlines()) == 1
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = TrainableAdapter(first_weights(stages.base.unet, small_adapter.SIZE, 192))
    assert not torch.equal(whole["gates"], start.gates)
    assert not any(weight.grad is not None for part in (stages.base, stages.reader) for weight in part.parameters())


def test_the_pairs_show_one_subject_and_say_what_the_target_shows() -> None:
    """But for those whose own look overrules the prompt, at strengths at which no other yields to it; and of some that
    are made of something only the language model is told."""
    pairs = small_adapter._Rows(30)
    (lowest, yields), (overrules, _) = small_adapter.YIELDING, small_adapter.OVERRULING
    assert lowest < small_adapter.TEXTURE_STRENGTH < yields < overrules
    swapped, overruled, yielding, silent = 0, 0, 0, 0
    for i in range(60):
        row = pairs[i]
        reference, target = (data.scene_of(row[key]) for key in ("reference", "target"))
        assert reference.subject == target.subject and reference != target and reference.material is None
        assert row["text"].startswith(f"photo of a {row['word']}. ")
        assert row["mask"].shape == (16, 16) and 0.05 < float(row["mask"].mean()) < 0.5
        told = pairs._tokenizer.decode([token for token in row["ids"] if token != IMAGE_TOKEN])
        said, heard = (
            {name for name, ways in MATERIAL_WORDS.items() if any(re.search(rf"\b{way}\b", text) for way in ways)}
            for text in (row["text"], told)
        )
        if target.material:
            assert target.material in heard and said in (heard, set()) and lowest <= row["strength"] <= yields
            yielding += 1
            silent += not said
        elif row["strength"] < 1:
            assert said == heard != set() and row["strength"] >= overrules
            overruled += 1
        swapped += row["target"] % 2 == 0
    assert yielding > 5 and overruled > 5 and 10 < swapped < 50 and 0 < silent < yielding / 2
    assert pairs[3]["ids"] == pairs[3]["ids"]  # The same each time.


@pytest.mark.parametrize("stage", [diffusion, small_adapter])
def test_pairs_of_shapes_are_part_of_what_a_stage_learns_from(
    stage: Any, stages: RandomStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_adapter, "_show", lambda *_: None)
    monkeypatch.setattr(diffusion, "_sheet", lambda *_: None)
    plan = Plan(samples=8, batch=8, rate=1e-3, warm_up=1)

    def trained(weight: float) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(stage, "SHAPES", weight)
        folder = tmp_path / f"{weight:g}"
        folder.mkdir()
        latents = random_latents(folder)
        others = (stages.base, stages.reader) if stage is small_adapter else ()
        state: dict[str, torch.Tensor] = stage.train(folder, *others, latents, stages.vae, CPU, plan).state_dict()
        return state

    without, again, with_pairs = trained(0.0), trained(1e-9), trained(1.0)
    learnt = [name for name in without if not torch.allclose(without[name], with_pairs[name], rtol=0, atol=1e-5)]
    same = [name for name in without if torch.allclose(without[name], again[name], rtol=0, atol=1e-5)]
    assert len(learnt) > 20 and len(same) > len(without) - len(learnt) / 2, (len(learnt), len(same), len(without))


def test_shaped_rows_differ_in_their_subjects_shape_and_in_nothing_else_that_could_tell_of_it() -> None:
    rows = small_adapter._ShapedRows()
    for number in range(0, 24, 2):
        one, other = rows[number], rows[number + 1]
        assert torch.equal(one["mask"], other["mask"])
        for key in ("ids", "text", "word", "strength"):
            assert one[key] == other[key], key
        assert not any(f" {word} " in one["text"] for ways in SHAPE_WORDS.values() for pair in ways for word in pair)
        for key in ("reference", "target"):
            differs = (one[key] != other[key]).any(dim=0).float()
            assert 0 < float(differs.mean()) < 0.5, key
        beyond = (one["target"] != other["target"]).any(dim=0).float()[None] * (
            torch.nn.functional.interpolate(one["mask"][None, None], 128)[0] == 0
        )
        assert float(beyond.mean()) < 0.005, "all that differs is under the mask of both"
    assert not torch.equal(rows[0]["pixels"], rows[1]["pixels"])


def test_an_adapter_keeps_its_image_tokens_where_the_language_model_says_the_same_in_other_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(small_adapter, "_REFITTED", 256)
    published = export.read_back(ROOT / "weights")
    assert published is not None
    known, further = language.SubjectReader(), language.SubjectReader()
    for reader in (known, further):
        reader.load_state_dict(published.language.weights, strict=False)
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(small_adapter.SIZE, small_adapter.SIZE)).Q
    with torch.no_grad():
        further.mapping.down_proj.weight.copy_(turned @ known.mapping.down_proj.weight)
    before = published.adapter
    after = small_adapter.refitted(before, known, further)
    assert after.seen == before.seen
    changed = {name for name, value in after.weights.items() if not torch.equal(value, before.weights[name])}
    assert changed == {"weights.projector.proj.weight", "weights.mapping.down_proj.weight"}
    rows = small_adapter._together([small_adapter._Rows(516)[i] for i in range(500, 516)])
    old, new = (TrainableAdapter(read_adapter(ROOT / "weights" / ADAPTER)) for _ in range(2))
    new.load_state_dict(after.weights)
    with torch.no_grad():
        hidden = further.hidden(rows["pixels"], rows["ids"])
        spoken, kept = (each.weights.projector(each.embedding(hidden)) for each in (old, new))
        lost = old.weights.projector(new.embedding(hidden))
    spread = (spoken - spoken.mean(dim=0)).square().sum()
    assert (kept - spoken).square().sum() < 0.05 * spread
    assert (lost - spoken).square().sum() > spread


def test_the_sample_sheet_is_made_by_the_product_from_held_out_subjects(
    stages: RandomStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(small_adapter, "_SHOWN", 2)
    monkeypatch.setattr(validation, "STEPS", 3)
    asked = small_adapter.questions()
    assert all(question.word in question.prompt for question in asked)
    latents = random_latents(tmp_path)
    adapter = TrainableAdapter(first_weights(stages.base.unet, small_adapter.SIZE, 192))
    torch.nn.init.constant_(adapter.gates, 1.0)
    training = Training(adapter, Plan(samples=2, batch=2, rate=1e-3), tmp_path / "state", CPU)
    small_adapter._show(training, stages.base, stages.reader, latents, stages.vae, tmp_path)
    rows = np.asarray(Image.open(tmp_path / "samples.png")).reshape(4, 128, 2, 128, 3).swapaxes(1, 2)
    reference, without, with_adapter, target = rows
    assert np.array_equal(reference[0], asked[0].picture.numpy())
    assert np.abs(without.astype(int) - with_adapter).mean() > 0.5
    assert np.array_equal(target[1], ((asked[1].target + 1) * 127.5).round().byte().movedim(0, -1).numpy())
