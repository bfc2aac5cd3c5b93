"""What a run says of the space that it will take, before it takes it."""

import os
from pathlib import Path
from typing import Any

import pytest

from workbench import ROOT

pytestmark = pytest.mark.newest
PHOTO_BYTES = (ROOT / "workbench" / "photo" / "photo.jpg").stat().st_size + len("photo.jpg") + 2


def rows(count: int) -> list[list[str]]:
    return [[f"r{i}", "photo.jpg", "cup", f"a cup {i % 5}", str(i)] for i in range(count)]


def space(place: Any, keep_free: int = 0, copies: bool = False, split: bool = False) -> Any:
    """Of the place's table, with what the journal knows."""
    from moma_batch.index import Index
    from moma_batch.plan import Planner, replay
    from moma_batch.results import is_there
    from moma_batch.space import Space

    place.out.mkdir(exist_ok=True)
    index = Index(place.out)
    Planner(place.folder / "table.csv", index, split=split).plan()
    list(replay(place.out, index, lambda entry: is_there(place.out, entry)))
    index.group()
    return Space(place.out, index, keep_free, copies)


def test_without_results_the_workflow_tells_the_size(place: Any) -> None:
    from moma_batch.space import PNG_BYTES_PER_PIXEL, REFERENCE_BYTES, SUBJECT_BYTES

    place.table([[*row, "256"] for row in rows(30)], ("id", "image", "subject", "prompt", "seed", "set.10.width"))
    pictures = 30 * 256 * 512 * PNG_BYTES_PER_PIXEL
    assert space(place).needed() == pictures
    subjects = 5 * SUBJECT_BYTES + REFERENCE_BYTES
    assert space(place, split=True).needed() == pictures + subjects
    assert space(place, copies=True, split=True).needed() == pictures + 2 * subjects + PHOTO_BYTES


def test_results_tell_it_better_and_a_finished_run_needs_nothing(place: Any) -> None:
    url, _ = place.server()
    words = ("--server", url, "--one-phase")
    assert place.do("run", str(place.table(rows(12))), *words)[0] == 0
    sizes = [path.stat().st_size for path in (place.out / "images").iterdir()]
    assert space(place).line() == ""
    place.table(rows(12 + 1000))
    assert abs(space(place).needed() - 1000 * sum(sizes) / 12) < 1
    status, output = place.do("check", str(place.folder / "table.csv"), *words)
    assert status == 0 and "will be written; " in output and "That will not fit" not in output


def test_too_little_space_is_said_before_anything_runs(place: Any) -> None:
    url, _ = place.server()
    for command in ("check", "run"):
        output = place.do(command, str(place.table(rows(30))), "--server", url, "--keep-free", str(10**9))[1]
        assert "About 17 MB will be written; " in output
        assert f"That will not fit: 0.0 KB may be filled (--keep-free {10**9})" in output
    assert not place.executed()


def test_what_the_results_show_is_said_once_while_the_run_goes_on(place: Any, monkeypatch: Any) -> None:
    from moma_batch import space as module

    url, _ = place.server()
    assert place.do("run", str(place.table(rows(12))), "--server", url, "--one-phase")[0] == 0
    place.table(rows(13))
    said: list[str] = []
    roomy, full = space(place), space(place, keep_free=1 << 60)
    full.look(said.append)
    assert not said, "not at every turn"
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    roomy.look(said.append)
    assert not said
    for _ in range(2):
        full.look(said.append)
    (line,) = said
    assert line.startswith("About 0.2 KB are still to be written. That will not fit: 0.0 KB may be filled")


def test_a_workflow_that_does_not_say_how_large_its_pictures_are_is_not_guessed(place: Any) -> None:
    graph = place.folder / "graph.json"
    graph.write_text(
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "photo.jpg"}},'
        ' "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}}',
        encoding="utf-8",
    )
    table = place.table([["a", "photo.jpg"]], ("id", "image"))
    output = place.do("check", str(table), "--workflow", str(graph), "--server", place.server()[0])[1]
    assert "How large the pictures will be is not known yet; " in output


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is started as a POSIX process")
def test_a_server_of_our_own_keeps_no_second_copy(place: Any) -> None:
    assert place.do("run", str(place.table(rows(4))), own=1)[0] == 0
    left = [path for path in Path(place.out / "workers").rglob("output/**/*") if path.is_file()]
    assert len(list((place.out / "images").iterdir())) == 4 and not left
