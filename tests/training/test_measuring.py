"""What the evaluation says of planted pictures of the small world: a copy, a wrong subject, an ignored prompt."""

import random
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from batch.made_run import MASK_NODES, WORKFLOW, MadeRun
from comfyui_moma.moma_batch.evaluate.evaluation import Measuring
from comfyui_moma.moma_batch.evaluate.images import views
from comfyui_moma.moma_batch.evaluate.samples import Run
from comfyui_moma.training.drawn import measured_subjects
from comfyui_moma.training.measuring import Colours, ProbeLooks, ProbeWords, backbones
from comfyui_moma.training.painter import paint
from comfyui_moma.training.words import PLACE_WORDS
from comfyui_moma.training.world import PLACES, draw_scene
from PIL import Image

pytestmark = pytest.mark.newest
SUBJECTS, SEEDS = 6, 2
KINDS = ("right", "copy", "wrong subject", "ignored prompt")


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Each measure's mean by what was planted. References lie in a place of their own; prompts ask for another."""
    made = MadeRun(tmp_path_factory.mktemp("planted") / "run1", {**WORKFLOW, **MASK_NODES})
    subjects = measured_subjects(SUBJECTS)
    for number, subject in enumerate(subjects):
        home, asked, other = (PLACES[(number + step) % len(PLACES)] for step in (0, 3, 5))
        reference, true = paint(draw_scene(random.Random(f"planted {number}"), subject, home))
        image, mask = made.file(f"{number}.png", reference), made.file(f"{number}_mask.png", true)
        stranger = subjects[(number + 1) % SUBJECTS]
        for seed in range(1, SEEDS + 1):
            rng = random.Random(f"planted {number} {seed}")
            pictures = {
                "right": paint(draw_scene(rng, subject, asked)),
                "copy": (reference, true),
                "wrong subject": paint(draw_scene(rng, stranger, asked)),
                "ignored prompt": paint(draw_scene(rng, subject, other)),
            }
            for kind in KINDS:
                row = {"id": f"{kind} {number} {seed}", "image": image, "mask": mask, "seed": str(seed)}
                row |= {"prompt": f"A {subject.name} {PLACE_WORDS[asked][0]}.", "note.planted": kind}
                made.add(row, *pictures[kind])
    lines = Measuring(Run(made.write()), backbones()).evaluate()
    assert not [line.problem for line in lines if line.problem]
    found: dict[str, dict[str, float]] = {}
    for name in lines[0].figures:
        of = {kind: [line.figures[name] for line in lines if line.columns["note.planted"] == kind] for kind in KINDS}
        found[name.partition(" [")[0]] = {kind: statistics.fmean(values) for kind, values in of.items()}
    return found


@pytest.mark.parametrize("measure", ["probe-I subject", "colours-I subject"])
def test_a_wrong_subject_is_the_least_alike(means: dict[str, dict[str, float]], measure: str) -> None:
    """By a margin; the right subject is as alike whether the prompt was followed or not."""
    of = means[measure]
    assert of["wrong subject"] + 0.1 < min(of["right"], of["ignored prompt"]) < of["copy"]
    assert abs(of["right"] - of["ignored prompt"]) < 0.1


def test_the_probe_sees_a_cut_out_subject_at_the_size_that_it_knows() -> None:
    """Of one painted subject here and there it says nearly the same (0.99); larger, as cut out, it said less (0.95)."""
    probe = ProbeLooks()
    alike = []
    for number, subject in enumerate(measured_subjects(16)):
        rng = random.Random(f"{number}")
        for place in PLACES[:3]:
            cuts = [views(*paint(draw_scene(rng, subject, where))).subject for where in (None, place)]
            one, other = torch.nn.functional.normalize(probe.images([cut for cut in cuts if cut]), dim=-1)
            alike.append(float(one @ other))
    assert statistics.fmean(alike) > 0.975


def test_an_ignored_prompt_and_a_copy_do_not_follow_it(means: dict[str, dict[str, float]]) -> None:
    of = means["probe-T"]
    assert max(of["copy"], of["ignored prompt"]) + 0.2 < of["right"]


def test_only_a_copy_brought_its_background_along(means: dict[str, dict[str, float]]) -> None:
    for measure in ("probe-W copy", "colours-I copy"):
        of = means[measure]
        rest = [of[kind] for kind in KINDS if kind != "copy"]
        assert of["copy"] > max(rest) + 0.2 and max(map(abs, rest)) < of["copy"], measure


def test_a_copied_background_earns_nothing_of_the_subject_alone(means: dict[str, dict[str, float]]) -> None:
    """On whole pictures a copy is far ahead of the right picture, on the subject alone it is not."""
    whole, alone = ({kind: means[name][kind] for kind in KINDS} for name in ("colours-I", "colours-I subject"))
    assert whole["copy"] - whole["right"] > 2 * (alone["copy"] - alone["right"])


def test_a_mask_on_the_subject_divides_it_from_the_rest(means: dict[str, dict[str, float]]) -> None:
    assert min(means["probe-I mask"][kind] for kind in ("right", "copy", "ignored prompt")) > 0.1
    assert means["probe-I mask"]["wrong subject"] < min(means["probe-I mask"][kind] for kind in ("right", "copy"))


def test_what_a_prompt_leaves_open_counts_for_nothing() -> None:
    words = ProbeWords()
    told = words.texts(["A mug on a beach.", "A mug made of gold.", "A hat."])
    assert told.sum(dim=1).tolist() == [2, 2, 1]
    assert torch.equal(told[0, :8], told[1, :8]) and not torch.equal(told[0], told[1])


def test_doubt_of_what_no_prompt_asked_for_changes_nothing() -> None:
    """Pictures half-way between two look less like one of two things; how much a prompt's other words count is the
    same, as every picture's vector is as long."""
    subjects = measured_subjects(2)
    pictures = [paint(draw_scene(random.Random("doubt"), subject, "beach"))[0] for subject in subjects]
    between = np.mean(pictures, axis=0).astype(np.uint8)
    lengths = ProbeWords().images([Image.fromarray(picture) for picture in (*pictures, between)]).norm(dim=1)
    assert torch.allclose(lengths, torch.tensor(3.0).sqrt().expand(3))


def test_colours_leave_out_what_is_white() -> None:
    def picture(size: int) -> Any:
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[:size, :size] = (200, 10, 10)
        return Image.fromarray(pixels)

    small, large, nothing = Colours().images([picture(8), picture(60), picture(0)])
    assert torch.allclose(small, large) and not nothing.any()
