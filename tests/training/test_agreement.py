"""Whether the evaluation ranks settings as the small world's truth does: the settings, the correlation, the page."""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_moma.moma_batch.evaluate.lines import Evaluation, Line, named
from comfyui_moma.moma_batch.evaluate.summary import figure_of
from comfyui_moma.training import agreement, agreement_page
from comfyui_moma.training.agreement_settings import PARTS, RECOMMENDED, TRUTHS, WHOLE, Setting, settings
from comfyui_moma.training.drawn import Asked, Read, SmallWorld, Variant, drawer, measured_subjects
from comfyui_moma.training.probe import load

from workbench import ROOT
from workbench.side_by_side import SideBySide
from workbench.small_world import CFG

ABOUT = {
    "definition": 1,
    "backbones": [
        {"name": "words", "image_measure": "probe-W", "text_measure": "probe-T"},
        {"name": "looks", "image_measure": "probe-I", "text_measure": ""},
        {"name": "colours", "image_measure": "colours-I", "text_measure": ""},
    ],
}
NAMES = {
    "probe-I subject": named("probe-I subject", "looks"),
    "colours-I subject": named("colours-I subject", "colours"),
    "probe-T": named("probe-T", "words"),
}


def read(distance: float, sure: float) -> Read:
    return Read(
        found=distance < 1,
        distance=distance,
        aimed=sure > 0.5,
        sure=sure,
        kind=True,
        shape=0.1,
        shapes=(0, 0),
        overlap=None,
    )


def world(follow: bool) -> tuple[Evaluation, dict[Setting, list[Read]]]:
    """Settings whose truth is drawn by lot; the figures follow it, or are drawn apart."""
    truths, lots = random.Random("truth"), random.Random("others")
    lines: list[Line] = []
    found: dict[Setting, list[Read]] = {}
    for setting in settings(11):
        distance, share = truths.random(), truths.random()
        found[setting] = [read(distance, (share + i / 10) % 1) for i in range(10)]
        near, told = (
            (-distance, sum(each.sure for each in found[setting]) / 10) if follow else (lots.random(), lots.random())
        )
        columns = {"strength": f"{setting.strength:g}", "weight": f"{setting.weight:g}"}
        columns |= {"note.task": setting.task, "note.parts": setting.parts, "note.cfg": f"{setting.cfg:g}"}
        figures = {name: told if measure == "probe-T" else near for measure, name in NAMES.items()}
        for seed in ("0", "1"):
            lines.append(Line(f"{len(lines)}", "ok", "", "0.png", "", "A cup.", seed, "r", columns, {}, figures))
    return Evaluation(Path("run"), lines, ABOUT), found


def test_each_task_has_thirty_settings_and_more_and_each_part_turned_off_once() -> None:
    chosen = settings(11)
    assert len(set(chosen)) == len(chosen)
    for task in RECOMMENDED:
        of = [setting for setting in chosen if setting.task == task]
        assert len(of) >= 30 and {setting.parts for setting in of} == {WHOLE, *PARTS}
        assert Setting(task, RECOMMENDED[task]) in of
    turned_off = Setting("texture", 0.4, 0.8, 2.0, "no shortcut")
    assert turned_off.variant() == Variant(shortcut=False, strength=0.4, weight=0.8, cfg=2.0)


def test_the_correlation_is_one_where_the_ranking_is_the_same_and_none_by_lot() -> None:
    for follow in (True, False):
        evaluation, found = world(follow)
        for kind, measures in TRUTHS.items():
            for measure in measures:
                value, count = agreement_page.correlation(evaluation, found, "context", kind, measure)
                assert count == len(settings(11)) // 2
                assert value == pytest.approx(1) if follow else abs(value) < 0.5


def test_the_page_has_rankings_strengths_and_parts(tmp_path: Path) -> None:
    evaluation, found = world(True)
    (tmp_path / "run").mkdir()
    options = argparse.Namespace(subjects=4, prompts=2, seeds=2, docs=tmp_path)
    page = agreement_page.page_of(replace(evaluation, folder=tmp_path / "run"), found, options)
    for task in RECOMMENDED:
        assert f"| {task} | prompt | {NAMES['probe-T']} | 40 | 1.00 |" in page
        assert sum(line.startswith(f"| {task} | {parts} |") for parts in (WHOLE, *PARTS) for line in page) == 6
    assert (tmp_path / agreement_page.CURVES).read_bytes().startswith(b"\x89PNG")


def test_the_part_takes_its_place_in_the_page_and_leaves_the_rest() -> None:
    first = agreement_page.placed("# Quality\n\nTables.\n", ["once"])
    again = agreement_page.placed(first + "\nMore.\n", ["twice"])
    assert again.startswith("# Quality\n\nTables.\n") and again.endswith("\nMore.\n")
    assert "twice" in agreement_page.part_of(again) and "once" not in again
    assert agreement_page.part_of("# Quality\n") == ""


BEFORE = {"probe-I subject": (0.793, 0.057), "colours-I subject": (0.434, 0.041), "probe-T": (0.807, 0.018)}
"""Mean and spread over the seeds, rounded up, of what the published weights draw here, when they were published."""


@pytest.mark.slow
def test_the_evaluation_sees_the_subject_and_nothing_fell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the product with the published small weights: more of the subject than by the prompt alone, by more than the
    seeds' spread; of subject and prompt no less than before, but for that spread."""
    chosen = [Setting("context", 1.0), Setting("context", 1.0, parts="nothing of MoMA")]
    from comfyui_moma.training import agreement_settings

    monkeypatch.setattr(agreement_settings, "settings", lambda strengths: chosen)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(agreement_page, "page_of", lambda evaluation, *_: seen.update(evaluation=evaluation) or [])
    out = {"out": tmp_path / "out", "files": ROOT / "weights", "docs": tmp_path}
    with SideBySide(2, drawer.__module__, drawer.__name__, ROOT / "weights", 4, 3) as drawers:
        agreement.measure(argparse.Namespace(subjects=4, prompts=1, seeds=3, strengths=2, **out), drawers)
    evaluation = seen["evaluation"]
    assert len(evaluation.lines) == 24 and not evaluation.failures
    by = agreement_page.by_setting(evaluation)
    for measure, (before, spread) in BEFORE.items():
        found, without = (figure_of(by[setting], evaluation.one(measure)) for setting in chosen)
        assert found and without and found.spread is not None
        assert found.mean > before - spread, (measure, found)
        if measure in TRUTHS["likeness"]:
            assert found.mean > without.mean + found.spread


@pytest.mark.slow
def test_a_settings_weight_is_that_of_the_image_tokens() -> None:
    """At 0 nothing is left of them."""
    drawn = SmallWorld(ROOT / "weights", load(), measured_subjects(1), seeds=1)
    pictures = [
        drawn.draw(Asked(0, "beach", None, variant))[0]
        for variant in (
            Variant(shortcut=False, weight=0.0),
            Variant(shortcut=False, image_tokens=False),
            Variant(shortcut=False),
        )
    ]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-2)


@pytest.mark.slow
def test_a_settings_cfg_is_that_of_the_sampler() -> None:
    drawn = SmallWorld(ROOT / "weights", load(), measured_subjects(1), seeds=1)
    usual, low = (drawn.draw(Asked(0, "beach", None, Variant(plain=True, cfg=cfg)))[0] for cfg in (CFG, 1.0))
    assert torch.equal(usual, drawn.draw(Asked(0, "beach", None, Variant(plain=True)))[0])
    assert not torch.allclose(usual, low, atol=1e-2)


@pytest.mark.slow
def test_a_prompt_that_is_said_to_none_changes_nothing() -> None:
    drawn = SmallWorld(ROOT / "weights", load(), measured_subjects(1), seeds=1)

    def pictures(**parts: bool) -> list[torch.Tensor]:
        return [drawn.draw(Asked(0, None, what, Variant(strength=0.4, **parts)))[0] for what in ("gold", "ice")]

    assert torch.allclose(*pictures(said=False, told=False), atol=1e-3)
    for parts in ({"said": False}, {"told": False}):
        assert not torch.allclose(*pictures(**parts), atol=1e-2), parts
