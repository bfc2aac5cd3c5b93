"""`moma_batch compare` and `study` on runs that are measured."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from moma_batch.command_line import main
from moma_batch.evaluate.compare import check_backbones, compare, differences
from moma_batch.evaluate.lines import Evaluation, Line, named, parts, read_evaluation
from moma_batch.evaluate.study import Study
from moma_batch.evaluate.summary import figure_of, groups
from moma_batch.table import TableError

pytestmark = pytest.mark.newest
CLIP, DINO = "clip-b32 11111111", "dino-s16 22222222"
LIKENESS, PROMPT = named("DINO subject", DINO), named("CLIP-T", CLIP)
ABOUT = {
    "definition": 1,
    "backbones": [
        {"name": CLIP, "image_measure": "CLIP-I", "text_measure": "CLIP-T", "sha256": "1" * 64},
        {"name": DINO, "image_measure": "DINO", "text_measure": "", "sha256": "2" * 64},
    ],
}
CONDITIONS = {"sampler_name": "ddim", "steps": "20", "ckpt_name": "sd15.safetensors"}


def line(subject: str, seed: int, likeness: float, prompt: float, **columns: str) -> Line:
    what = "".join(f"_{value}" for value in columns.values())
    asked = (subject, columns.get("note.class", ""), "a toy on the beach", str(seed), f"digest of {subject}")
    figures = {LIKENESS: likeness, PROMPT: prompt}
    return Line(f"{subject}_{seed}{what}", "ok", "", *asked, columns, dict(CONDITIONS), figures)


def run(name: str, change: float = 0.0, backbone: str = DINO) -> Evaluation:
    """Two subjects and two seeds whose means differ by 0.02: a spread of 0.01414."""
    lines = [
        line(subject, seed, base + 0.02 * seed + change, 0.3)
        for subject, base in (("red", 0.5), ("blue", 0.7))
        for seed in (1, 2)
    ]
    if backbone != DINO:
        for one in lines:
            one.figures[named("DINO subject", backbone)] = one.figures.pop(LIKENESS)
    return Evaluation(Path(name), lines, ABOUT)


def test_names_of_figures_say_their_backbone_and_are_read_again() -> None:
    assert LIKENESS == "DINO subject [dino-s16 22222222]" and parts(LIKENESS) == ("DINO subject", DINO)
    assert parts("mask area") == ("mask area", "") and named("mask area", "") == "mask area"


def test_a_spread_is_that_of_the_seeds_not_of_the_subjects() -> None:
    figure = figure_of(run("a").lines, LIKENESS)
    assert figure is not None and figure.pictures == 4
    assert figure.mean == pytest.approx(0.63) and figure.spread == pytest.approx(0.02 / 2**0.5)
    lacking = figure_of(run("a").lines[:3], LIKENESS)
    assert lacking is not None and lacking.spread is None, "the seeds do not have the same subjects"
    assert [name for _, name, _ in groups(run("a").lines)] == ["", "red", "blue"]


def test_a_fall_by_more_than_the_spread_is_one(tmp_path: Path) -> None:
    for change, fell in ((-0.02, True), (-0.01, False), (0.02, False)):
        page, fallen = compare([run("before"), run("after", change)])
        assert fallen == ([f"{LIKENESS} in after"] if fell else []), page
        (found,) = [one for one in differences(run("before"), run("after", change)) if one.name == LIKENESS]
        assert found.change == pytest.approx(change)


def test_figures_of_different_backbones_are_never_side_by_side() -> None:
    other = run("b", backbone="dino-b8 33333333")
    with pytest.raises(
        TableError, match=r"DINO subject is measured by dino-s16 2+ in a and by dino-b8 3+ in b: .*cannot"
    ):
        compare([run("a"), other])
    with pytest.raises(TableError, match="different backbones"):
        Study([run("a"), other]).panels()
    renamed = run("b", backbone="my-dino 22222222")
    check_backbones([run("a"), renamed])
    assert len(differences(run("a"), renamed)) == 2, "the same weights in a folder of another name"
    with pytest.raises(TableError, match="different versions"):
        check_backbones([run("a"), replace(run("b"), about={**ABOUT, "definition": 2})])


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_comparison_wants_the_same_sampler_and_checkpoint(condition: str) -> None:
    other = run("b")
    for one in other.lines:
        one.conditions[condition] = "other"
    with pytest.raises(TableError, match=rf"differ in more than .* {condition}: {CONDITIONS[condition]} and other"):
        compare([run("a"), other])
    page, _ = compare([run("a"), other], anyway=True)
    assert f"- differs: {condition}: {CONDITIONS[condition]} and other" in page


def test_a_comparison_wants_the_same_references_prompts_and_seeds() -> None:
    fewer = replace(run("b"), lines=run("b").lines[1:])
    with pytest.raises(TableError, match=r"b was not asked for 1 pictures of the other run \(red_1\)"):
        compare([run("a"), fewer])
    with pytest.raises(TableError, match=r"b was not asked for 1 pictures"):
        compare([fewer, run("a")])
    twice = replace(run("b"), lines=[*run("b").lines, line("red", 1, 0.5, 0.3, strength="2")])
    with pytest.raises(TableError, match="b has red_1 and red_1_2 for one reference, prompt and seed"):
        compare([run("a"), twice])


def test_failures_are_left_out_of_both_and_counted() -> None:
    failed = replace(run("b").lines[0], status="failed", problem="the mask is empty", figures={})
    other = replace(run("b", -0.5), lines=[failed, *run("b").lines[1:]])
    page, fallen = compare([run("a"), other])
    assert "- b: 1 failures" in page and not fallen
    assert {found.first.pictures for found in differences(run("a"), other)} == {3}


def study(folder: Path) -> Evaluation:
    """Strengths against weights in two parts; of the first the point 0.8, 1.0 is the best, of the second 0.4, 1.0."""
    lines = []
    for part, best in (("context", 0.8), ("texture", 0.4)):
        for weight in (0.5, 1.0):
            for strength in (0.0, 0.4, 0.8, 1.0):
                near = weight - abs(strength - best)
                columns = {"weight": str(weight), "strength": str(strength), "note.class": part}
                lines += [
                    line("red", seed, 0.6 + 0.2 * near + 0.01 * seed, 0.3 + 0.1 * near, **columns) for seed in (1, 2)
                ]
    return Evaluation(folder, lines, ABOUT)


def test_the_chosen_point_is_nearest_to_both_at_their_best() -> None:
    panels = Study([study(Path("a"))], by=("weight", "strength"), split="note.class").panels()
    assert [(panel.title, len(panel.points)) for panel in panels] == [("context", 8), ("texture", 8)]
    assert [panel.chosen.setting for panel in panels] == [("1.0", "0.8"), ("1.0", "0.4")]
    assert [point.setting for point in panels[0].points][:2] == [("0.5", "0.0"), ("0.5", "0.4")]


def test_a_point_that_is_best_at_one_alone_is_not_chosen() -> None:
    """The corner is that of both ranges, so neither figure's own scale decides."""
    pairs = ((0.5, 0.30), (0.79, 0.295), (0.8, 0.2))
    lines = [line("red", 1, a, b, strength=str(i)) for i, (a, b) in enumerate(pairs)]
    (panel,) = Study([Evaluation(Path("a"), lines, ABOUT)], by=("strength",)).panels()
    assert panel.chosen.setting == ("1",)


def test_what_another_seed_would_change_does_not_choose() -> None:
    """The prompt is right at all strengths, but for chance; the likeness rises."""
    pairs = ((0.5, 0.300), (0.7, 0.304), (0.8, 0.301))
    for chance, chosen in ((0.02, "2"), (0.0, "1")):
        lines = [
            line("red", seed, a, b + seed * chance, strength=str(strength))
            for strength, (a, b) in enumerate(pairs)
            for seed in (1, 2)
        ]
        (panel,) = Study([Evaluation(Path("a"), lines, ABOUT)], by=("strength",)).panels()
        assert panel.chosen.setting == (chosen,), chance


def test_what_nobody_would_see_does_not_choose() -> None:
    """All prompts are right, and by both seeds alike: a ten-thousandth less is none of the prompt's doing."""
    for least, chosen in ((0.2999, "2"), (0.2900, "1")):
        pairs = ((0.5, 0.3000), (0.7, 0.3000), (0.8, least))
        lines = [line("red", 1, a, b, strength=str(strength)) for strength, (a, b) in enumerate(pairs)]
        (panel,) = Study([Evaluation(Path("a"), lines, ABOUT)], by=("strength",)).panels()
        assert panel.chosen.setting == (chosen,), least


def written(folder: Path) -> Evaluation:
    """The study as files of a run."""
    from moma_batch.evaluate.lines import write_lines
    from moma_batch.evaluate.samples import Sample

    found = study(folder)
    folder.mkdir()
    write_lines(folder, [Sample(one.id, 1, "ok") for one in found.lines], found.lines, ABOUT)
    return found


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = written(tmp_path / "run1")
    read = read_evaluation(tmp_path / "run1")
    for one, wanted in zip(read.lines, found.lines, strict=True):
        assert one.figures == pytest.approx(wanted.figures) and replace(one, figures={}) == replace(wanted, figures={})
    assert read.about == ABOUT and read.one("CLIP-T") == PROMPT
    with pytest.raises(TableError, match=r"has no figure 'LPIPS'. It has DINO subject, CLIP-T"):
        read.one("LPIPS")


def test_a_study_draws_its_curve_with_the_chosen_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run1"
    written(folder)
    words = ["study", str(folder), "--by", "weight", "--by", "strength", "--split", "note.class"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "context: best of 8: 1.0, 0.8 (likeness" in out and "texture: best of 8: 1.0, 0.4 (likeness" in out
    place = folder / "evaluation"
    with (place / "study.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["strength"]) for row in rows if row["chosen"]] == [("context", "0.8"), ("texture", "0.4")]
    svg = (place / "study.svg").read_text("utf-8")
    assert svg.lstrip().startswith("<?xml") and (place / "study.png").read_bytes().startswith(b"\x89PNG")
    before = svg.encode()
    assert main(words) == 0 and (place / "study.svg").read_bytes() == before, "the same study is the same file"
    assert main([*words[:4], "--likeness", "CLIP-T", "--prompt", LIKENESS, "--out", str(place)]) == 0
    assert (place / "study.svg").read_bytes() != before


def test_what_is_wrong_with_a_study_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run1"
    for words, wanted in (
        (["study", str(folder), "--by", "strength"], "is not measured: give `evaluate"),
        (["compare", str(folder)], "compare wants two runs or more"),
    ):
        assert main(words) == 2 and wanted in capsys.readouterr().err
    written(folder)
    for words, wanted in (
        (["study", str(folder)], "wants --by COLUMN"),
        (["study", str(folder), "--by", "stength"], "has no column 'stength'. It has weight, strength"),
        (["study", str(folder), "--by", "strength", "--likeness", "LPIPS"], "has no figure 'LPIPS'"),
    ):
        assert main(words) == 2 and wanted in capsys.readouterr().err


def test_without_matplotlib_the_table_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "run1")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["study", str(tmp_path / "run1"), "--by", "strength"]) == 2
    assert "needs Matplotlib in this Python" in capsys.readouterr().err
    assert (tmp_path / "run1" / "evaluation" / "study.csv").is_file()


def test_several_runs_are_points_of_a_study(tmp_path: Path) -> None:
    (panel,) = Study([run("a"), run("b", 0.1)]).panels()
    assert [point.setting for point in panel.points] == [("a",), ("b",)] and panel.chosen.setting == ("b",)
    other = run("b")
    other.lines[0].conditions["steps"] = "50"
    with pytest.raises(TableError, match="steps: 20 and 50"):
        Study([run("a"), other]).panels()
    assert len(Study([run("a"), other], anyway=True).panels()) == 1


def test_evaluation_json_without_texts_has_no_prompt() -> None:
    about = json.loads(json.dumps(ABOUT))
    about["backbones"] = about["backbones"][1:]
    with pytest.raises(TableError, match="has no figure of the prompt"):
        Study([replace(study(Path("a")), about=about)], by=("strength",)).panels()
