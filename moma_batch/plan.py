"""From the table to tasks: every row and seed one, and one for each subject that must be encoded first."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .graphs import whole, workflow_at
from .index import Index
from .inputs import Inputs
from .jobs import Graph, Upload
from .journal import entries
from .phases import PLACEHOLDER, encodings, without_encoding
from .table import Row, RowError, TableError, read_rows, seeds
from .tasks import APART, Planned
from .workflow import DEFAULT, FILES, SAVE_IMAGE, has_seed, node_called

Identity = Callable[[Graph], list[str]]
"""What is known of the weights that a graph names, beyond their names."""
NAME_BYTES = 150
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*~\ud800-\udfff]')
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[\d¹²³]|LPT[\d¹²³])", re.IGNORECASE)
INVALID = "invalid"


@dataclass
class Planner:
    """Puts the rows of a table into an index.

    Attributes:
        table: The table's file; what its rows name lies below its folder, or one of `inputs`.
        workflow: The workflow of rows that name none.
        identity: See `Identity`.
        split: Encode subjects first, where the graph allows it.
    """

    table: Path
    index: Index
    workflow: Path = DEFAULT
    inputs: Sequence[Path] = ()
    identity: Identity = lambda _: []
    split: bool = True
    problems: int = 0
    _files: Inputs = field(init=False)
    _last: "tuple[Any, list[tuple[str, Planned]]]" = field(init=False, default=(None, []))
    """The encodings of the row before, which rows that differ in their seed alone share."""

    def __post_init__(self) -> None:
        """Look for files below the table's folder."""
        self._files = Inputs(self.index, [self.table.resolve().parent, *self.inputs])

    def plan(self) -> int:
        """Put all rows in; how many there are.

        Raises:
            TableError: The table or the workflow cannot be used.
        """
        workflow_at(self.workflow)
        count = 0
        with self.index.together():
            for row in read_rows(self.table):
                count += 1
                self._add_row(row)
        if not count:
            raise TableError(f"{self.table} has no rows.")
        return count

    def _add_row(self, row: Row) -> None:
        row_id = row.values.get("id", f"row{row.number:06}").strip()
        try:
            if row.problem:
                raise RowError(row.problem)
            name = checked_name("output" if "output" in row.values else "id", row.values.get("output", row_id))
            checked_name("id", row_id)
            tasks = list(self._tasks(row, row_id, name))
        except RowError as error:
            self._add_invalid(row, row_id, str(error))
            return
        for task, parts in tasks:
            if problem := self._taken(task):
                self._add_invalid(row, task.id, problem)
                continue
            needs = [self._add_encoding(part) for part in parts]
            self.index.add(task._replace(needs=needs))

    def _taken(self, task: Planned) -> str:
        """Why a task cannot be put in: another row has its id, or its name."""
        if self.index.find(task.id):
            return f"id {task.id!r} is another row's; give each row its own"
        other = self.index.row_of(str(task.name))
        return f"output {task.name!r} is that of row {other}; give each row its own" if other else ""

    def _add_invalid(self, row: Row, task_id: str, problem: str) -> None:
        self.problems += 1
        shown = task_id if task_id and not self.index.find(task_id) else f"row{row.number:06}"
        number = 1
        while self.index.find(shown):
            number += 1
            shown = f"row{row.number:06} ({number})"
        task = Planned(shown, row.number, None, "", False, "", "", {"values": row.values})
        self.index.add(task, INVALID, problem)

    def _tasks(self, row: Row, row_id: str, name: str) -> Iterator[tuple[Planned, list[Planned]]]:
        """The tasks of a row, one for each seed, each with those that encode its subjects."""
        left_out = ("id", "output", "seed")
        values = {k: v for k, v in row.values.items() if not k.startswith("note.") and k not in left_out}
        path = self._workflow(values.pop("workflow", None))
        workflow = workflow_at(path)
        files, digest = self._find_files(workflow, values)
        spec: dict[str, Any] = {"workflow": str(path), "values": values, "seed": None}
        spec["files"] = {text: [upload.name, str(upload.path)] for text, upload in files.items()}
        grouped = f"{path}|{values.get('checkpoint', '')}|{digest.get(values.get('image', ''), '')}"
        chosen = seeds(row.values.get("seed"))
        for seed in chosen:
            graph = whole(workflow, values, seed, files)
            if not any(node["class_type"].startswith("Save") for node in graph.values()):
                raise RowError("workflow: it saves nothing; add Save Image")
            order = f"{values.get('prompt', '')}|{seed or 0:020}"
            parts = self._parts(row, graph, spec, grouped, order)
            subjects = {node: part.key for node, part in parts}
            graph = without_encoding(graph, {node: PLACEHOLDER + key for node, key in subjects.items()})
            suffix = f"_{seed}" if len(chosen) > 1 else ""
            own = {**spec, "seed": seed, "subjects": subjects}
            key = self._key(graph)
            task = Planned(f"{row_id}{suffix}", row.number, f"{name}{suffix}", key, False, grouped, order, own)
            yield task, [part for _, part in parts]

    def _parts(
        self, row: Row, graph: Graph, spec: dict[str, Any], grouped: str, order: str
    ) -> list[tuple[str, Planned]]:
        """What encodes the subjects of a row, by the nodes of its graph that look at them."""
        shared = (spec["workflow"], list(spec["values"].items()), spec["files"])
        if self._last[0] != shared:
            found = list(encodings(graph)) if self.split and "subject_file" not in spec["values"] else []
            if any(has_seed(part) for _, part in found):
                found = []  # they would be others for each seed
            made = [(name, self._encoding(row, part, {**spec, "node": name}, grouped, order)) for name, part in found]
            self._last = (shared, made)
        return self._last[1]

    def _encoding(self, row: Row, part: Graph, spec: dict[str, Any], grouped: str, order: str) -> Planned:
        key, text = self._key(part), json.dumps(part)
        spec["files"] = {named: file for named, file in spec["files"].items() if file[0] in text}
        return Planned(f"encoding:{key}", row.number, None, key, True, grouped, order, spec)

    def _add_encoding(self, part: Planned) -> int:
        found = self.index.find(part.id)
        return found[0] if found else self.index.add(part)

    def _workflow(self, named: str | None) -> Path:
        if named is None:
            return self.workflow
        upload, _ = self._files.find("workflow", named, picture=False)
        try:
            workflow_at(upload.path)
        except TableError as error:
            raise RowError(str(error)) from error
        return upload.path

    def _find_files(self, workflow: Graph, values: dict[str, str]) -> tuple[dict[str, Upload], dict[str, str]]:
        """The files that a row names, by the text that names them, and their digests."""
        found, digests = {}, {}
        for column, text in values.items():
            picture = column in ("image", "mask")
            if column.startswith("set."):
                name, _, key = column.removeprefix("set.").rpartition(".")
                picture = (workflow[node_called(workflow, name, column)]["class_type"], key) in FILES
            if picture or column == "subject_file":
                found[text], digests[text] = self._files.find(column, text, picture)
        return found, digests

    def _key(self, graph: Graph) -> str:
        """SHA-256 of a graph, which names its pictures by their content, and of what is known of its weights."""
        plain = {name: [node["class_type"], dict(node["inputs"])] for name, node in graph.items()}
        for kind, inputs in plain.values():
            if kind == SAVE_IMAGE:
                inputs["filename_prefix"] = ""
        text = json.dumps([plain, self.identity(graph)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def checked_name(column: str, name: str) -> str:
    """A name for a file below the run's folder, with subfolders if wanted, that every system can have.

    Raises:
        RowError: It leads elsewhere, or is no such name.
    """
    plain = name.strip().replace("\\", "/")
    for part in plain.split("/"):
        problem = None
        if part in ("", ".", ".."):
            problem = "leads out of the run's folder" if part else "has an empty part"
        elif found := _FORBIDDEN.search(part):
            problem = f"holds {found[0]!r}"
        elif part != part.rstrip(". ") or _DEVICES.fullmatch(part.split(".")[0].rstrip()):
            problem = f"has the part {part!r}, which not every system allows"
        elif len(part.encode()) > NAME_BYTES:
            problem = f"is longer than {NAME_BYTES} bytes"
        if problem:
            raise RowError(f"{column} {name[:80]!r} {problem}; give a name such as a17 or cups/red")
    return plain


def replay(folder: Path, index: Index, is_there: Callable[[dict[str, Any]], bool]) -> Iterator[str]:
    """Tell an index what the journal knows of its tasks; gives a line for each thing that is not as it was.

    Args:
        is_there: Whether the files of a finished task are, from what the journal says of it.
    """
    changed = gone = 0
    with index.together():
        for entry in entries(folder):
            found = index.find(str(entry.get("task", "")))
            if found is None or entry["event"] not in ("begin", "end", "retry"):
                continue
            no, key, state = found
            if state == INVALID:
                continue
            if entry["event"] == "retry":
                index.note(no, "pending")
                index.forgive(no)
            elif key != entry.get("key"):
                changed += entry.get("status") == "ok"
            elif entry["event"] == "begin":
                index.note_begun(no, entry)
            elif entry["status"] == "fault":
                index.note(no, "pending")
                index.charge(no, str(entry.get("worker", "")))
            elif entry["status"] in ("stopped", "full", APART):
                index.note(no, "pending")
                if entry["status"] == APART:
                    index.set_alone(no)
            elif entry["status"] == "ok" and not is_there(entry):
                gone += 1
                index.note(no, "pending")
            else:
                index.note(no, entry["status"], entry.get("message", ""), entry)
    if changed:
        yield f"{changed} finished rows are others now than they were: they are done again."
    if gone:
        yield f"{gone} finished files are no longer there or have another size: they are made again."
