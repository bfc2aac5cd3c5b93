"""From rows to graphs: what a column does, what stays as it is, and what is refused in which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from workbench import ROOT

pytestmark = pytest.mark.newest
GRAPH = ROOT / "moma_batch" / "default.json"


def planned(place: Any, rows: list[dict[str, Any]], split: bool = True, workflow: Path = GRAPH) -> list[Any]:
    """All tasks of a table of JSON lines, encodings last."""
    from moma_batch.index import Index
    from moma_batch.plan import Planner

    table = place.folder / "table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    place.out.mkdir(exist_ok=True)
    index = Index(place.out)
    Planner(table, index, workflow, split=split).plan()
    index.group()
    found = [*index.tasks(), *index.tasks(encodes=True)]
    index.close()
    return found


def graph(task: Any) -> dict[str, Any]:
    from moma_batch.graphs import graph_of

    return graph_of(task.spec)


def test_columns_go_to_their_nodes_and_nothing_else_changes(place: Any) -> None:
    row = {
        "id": "a", "image": "photo.jpg", "mask": "other.jpg", "subject": "mug", "prompt": "A mug.", "seed": 7,
        "negative": "blurry", "strength": 0.4, "weight": 0.9, "checkpoint": "x.safetensors",
        "set.Empty Latent Image.width": 256,
        "set.11.sampler_name": "euler", "set.5.cache": False, "note.x": "y",
    }  # fmt: skip
    (task,) = planned(place, [row], split=False)
    made, before = graph(task), json.loads(GRAPH.read_text(encoding="utf-8"))
    changes = {
        (name, key): value
        for name, node in made.items()
        for key, value in node["inputs"].items()
        if name not in before or before[name]["inputs"].get(key) != value
    }
    image, mask = changes.pop(("2", "image")), changes.pop(("moma_batch_mask", "image"))
    assert image.startswith("moma_batch/") and mask.startswith("moma_batch/") and image != mask
    assert changes == {
        ("moma_batch_mask", "channel"): "red", ("5", "mask"): ["moma_batch_mask", 0],
        ("5", "subject"): "mug",
        ("5", "prompt"): "A mug.", ("5", "cache"): False, ("7", "text"): "blurry", ("11", "seed"): 7,
        ("9", "strength"): 0.4, ("8", "weight"): 0.9, ("1", "ckpt_name"): "x.safetensors", ("10", "width"): 256,
        ("11", "sampler_name"): "euler",
    }  # fmt: skip


def test_rows_share_an_encoding_unless_it_would_differ(place: Any) -> None:
    base = {"image": "photo.jpg", "subject": "cup", "prompt": "A cup."}
    rows = [
        {**base, "seed": "1..3"}, {**base, "strength": 0.4}, {**base, "prompt": "Two cups."},
        {**base, "image": "other.jpg"}, {**base, "prompt": "A {red|blue} cup."},
    ]  # fmt: skip
    tasks = planned(place, rows)
    encodings = [task for task in tasks if task.encodes]
    pictures = [task for task in tasks if not task.encodes]
    assert len(pictures) == 7 and len({task.key for task in pictures}) == 7 and len(encodings) == 3
    for task in encodings:
        classes = {node["class_type"] for node in graph(task).values()}
        assert classes == {"LoadImage", "MoMALoadMLLM", "MoMALoadAdapter", "MoMAExtractSubject", "MoMASaveSubject"}
    for task in pictures:
        classes = {node["class_type"] for node in graph(task).values()}
        whole = "{" in task.spec["values"]["prompt"]
        assert ("MoMALoadMLLM" in classes) == ("MoMAExtractSubject" in classes) == whole
        assert ("MoMALoadSubject" in classes) != whole


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"seed": "1..99999999"}, "give whole numbers from 0"),
        ({"seed": "3;3"}, "give each seed once"),
        ({"seed": -1}, "give whole numbers"),
        ({"strength": "much"}, "strength is 'much'; give a number"),
        ({"strength": "nan"}, "strength is 'nan'; give a number"),
        ({"set.5.cache": "maybe"}, "set.5.cache is 'maybe'; give true or false"),
        ({"set.77.steps": 1}, "0 nodes are called '77'"),
        ({"set.KSampler.stpes": 1}, "has no input 'stpes': seed, steps"),
        ({"workflow": "ui.json"}, "is in the editor's format"),
        ({"workflow": "../table.jsonl"}, "lies outside of"),
        ({"output": "a/../../b"}, "leads out of the run's folder"),
        ({"output": "/etc/passwd"}, "has an empty part"),
        ({"id": "con.png"}, "which not every system allows"),
        ({"id": "a:b"}, "holds ':'"),
        ({"prompt": ["x"]}, "a cell is a text"),
        ({"promt": "x"}, "has the column 'promt'"),
        ({"subject_file": "none.safetensors"}, "there is no file"),
        ({"image": "/etc/hostname"}, "lies outside of"),
        ({"image": "linked.jpg"}, "lies outside of"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(place: Any, cells: dict[str, Any], message: str) -> None:
    (place.folder / "ui.json").write_text('{"nodes": [], "links": []}', encoding="utf-8")
    outside = place.folder.parent / f"{place.folder.name}-outside.jpg"
    outside.write_bytes((place.folder / "photo.jpg").read_bytes())
    (place.folder / "linked.jpg").symlink_to(outside)
    good = {"id": "good", "image": "photo.jpg"}
    tasks = planned(place, [good, {"id": "x", "image": "photo.jpg", **cells}, {"image": "photo.jpg"}], split=False)
    assert [task.state for task in tasks] == ["pending", "invalid", "pending"]
    assert message in tasks[1].message


def test_a_torn_journal_is_read_and_gone_on_with(tmp_path: Path) -> None:
    from moma_batch.journal import Journal, entries

    (tmp_path / "journal.jsonl").write_bytes(b'{"event": "end", "task": "a"}\n{"event": "end", "ta')
    journal = Journal(tmp_path)
    journal.add("end", {"task": "b"})
    journal.close()
    assert [entry["task"] for entry in entries(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("id,id\n", "twice"), ("id,imge\n", "'imge'")])
def test_a_table_that_is_none_is_refused(place: Any, content: str, message: str) -> None:
    table = place.folder / "table.csv"
    table.write_text(content, encoding="utf-8")
    status, output = place.do("check", str(table), "--server", "http://127.0.0.1:1")
    assert status == 2 and message in output
    table.write_bytes(b"id,prompt\na,\xff\xfe\n")
    status, output = place.do("check", str(table), "--server", "http://127.0.0.1:1")
    assert status == 2 and "is not UTF-8" in output
