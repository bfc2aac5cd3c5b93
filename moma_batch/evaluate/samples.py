"""What there is to measure in a run: of each picture the reference, masks, prompt, seed and sampler."""

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..graphs import whole, workflow_at
from ..jobs import Graph, Upload
from ..lock import is_held
from ..results import PLAN, RESULTS
from ..table import Row, RowError, TableError, read_rows, seeds
from ..workflow import SAVE_IMAGE, is_link, seeds_of, texts_of

MEASURED = "ok"
_OWN = ("id", "output", "seed", "workflow")
_SAMPLER = ("sampler_name", "scheduler", "steps", "cfg", "denoise", "start_at_step", "end_at_step")
_MODELS = ("ckpt_name", "unet_name", "vae_name")
_SIZE = ("width", "height")


@dataclass(frozen=True)
class Sample:
    """A picture that was asked for.

    Attributes:
        id: As in `results.csv`.
        row: Of the table, from 1.
        status: As in `results.csv`; `MEASURED` if there is a picture.
        problem: Why it cannot be measured; empty if it can.
        subject: What its figures are summed up under: `note.subject`, else the reference's name.
        kind: The class of its prompt: `note.class`, or empty.
        columns: The row's other cells, as in strength or note.anything.
        conditions: What it was sampled with, to be the same where runs are compared.
        sha256: Of the picture.
        reference, reference_mask, mask, true_mask: Files; `mask` is the subject's, found by the run or given for it,
            `true_mask` where it really is.
        digests: SHA-256 of each of these files, by the names of the attributes.
    """

    id: str
    row: int
    status: str
    problem: str = ""
    subject: str = ""
    kind: str = ""
    prompt: str = ""
    seed: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    picture: Path = Path()
    sha256: str = ""
    reference: Path = Path()
    reference_mask: Path | None = None
    mask: Path | None = None
    true_mask: Path | None = None
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        workflow: In place of the one that the run's plan names.
        masks: A folder with a mask for each picture, under the picture's name; else those that the run saved.
        so_far: Take a run that has not ended.
    """

    folder: Path
    workflow: Path | None = None
    masks: Path | None = None
    so_far: bool = False

    def check(self) -> tuple[Path, Path, list[dict[str, str]]]:
        """Table, workflow, and the lines of the results.

        Raises:
            TableError: The folder holds no run, or one that has not ended.
        """
        plan = self._plan()
        workflow = self.workflow or (Path(plan["workflow"]) if "workflow" in plan else None)
        if workflow is None:
            raise TableError(f"{self.folder} does not say which workflow it ran: name it with --workflow.")
        workflow_at(workflow)
        if self.masks is not None and not self.masks.is_dir():
            raise TableError(f"--masks {self.masks} is no folder.")
        return Path(plan["table"]), workflow, self._results()

    def samples(self) -> list[Sample]:
        """All pictures that were asked for, in the order of the table.

        Raises:
            TableError: See `check`; or the table is gone.
        """
        table, workflow, results = self.check()
        rows = {row.number: row for row in read_rows(table)}
        reader = _Reader(self, table.parent, workflow)
        return [reader.sample(result, rows.get(int(result["row"]))) for result in results]

    def _plan(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / PLAN).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise TableError(f"{self.folder} is no folder of a run: {error}") from error

    def _results(self) -> list[dict[str, str]]:
        path = self.folder / RESULTS
        if is_held(self.folder) and not self.so_far:
            raise TableError(f"moma_batch works in {self.folder}: wait until it ends, or give --so-far.")
        if not path.is_file():
            raise TableError(f"{self.folder} has no {RESULTS} yet: it is written when a run ends or is stopped.")
        with path.open(encoding="utf-8", newline="") as file:
            results = list(csv.DictReader(file))
        waiting = sum(result["status"] == "waiting" for result in results)
        if waiting and not self.so_far:
            raise TableError(
                f"{self.folder} is unfinished, {waiting} of {len(results)} pictures are not made: give its `run` "
                "command again, or --so-far to measure what is there."
            )
        return results


class _Names(dict[str, Upload]):
    """Files under the names that a table gives them."""

    def __missing__(self, text: str) -> Upload:
        return Upload(text, Path(text))


class _Reader:
    """Puts a line of the results and its row together."""

    def __init__(self, run: Run, home: Path, workflow: Path) -> None:
        self._run, self._home, self._workflow = run, home, workflow
        self._digests: dict[Path, str] = {}

    def sample(self, result: Mapping[str, str], row: Row | None) -> Sample:
        if row is None:
            problem = "the table has no such row any more"
            return Sample(result["id"], int(result["row"]), result["status"], problem)
        values = row.values
        subject = values.get("note.subject") or values.get("image") or values.get("note.image") or ""
        columns = {k: v for k, v in values.items() if k not in _OWN and k not in ("image", "mask", "prompt")}
        known: dict[str, Any] = {"subject": subject, "kind": values.get("note.class", ""), "columns": columns}
        known["prompt"] = values.get("prompt") or values.get("note.prompt") or ""
        problem = "" if result["status"] == MEASURED else result["message"] or result["status"]
        try:
            known |= self._asked(result["id"], values)
            known |= self._reference(values)
            if not problem:
                made = self._made(result, known.pop("graph"))
                known |= {**made, "digests": {**known["digests"], **made["digests"]}}
        except (RowError, TableError, OSError) as error:
            problem = problem or str(error)
        known.pop("graph", None)
        return Sample(result["id"], int(result["row"]), result["status"], problem, **known)

    def _asked(self, sample_id: str, values: Mapping[str, str]) -> dict[str, Any]:
        """Prompt, seed and conditions, from the row's graph."""
        chosen = seeds(values.get("seed"))
        given = {k: v for k, v in values.items() if not k.startswith("note.") and k not in _OWN}
        path = self._home / values["workflow"] if "workflow" in values else self._workflow
        seed = next((one for one in chosen if len(chosen) > 1 and sample_id.endswith(f"_{one}")), chosen[0])
        graph = whole(workflow_at(path), given, seed, _Names())
        prompts = texts_of(graph, "prompt")
        prompt = values.get("prompt") or values.get("note.prompt") or (prompts[0] if prompts else "")
        if not prompt:
            raise RowError("prompt: there is none in the row or its workflow; give it as note.prompt")
        if "{" in prompt and "|" in prompt:
            raise RowError(f"prompt {prompt[:80]!r} leaves a choice, so nobody knows what was asked for")
        conditions = {}
        for key in (*_SAMPLER, *_MODELS, *_SIZE):
            found = [node["inputs"][key] for node in graph.values() if not is_link(node["inputs"].get(key, [0, 0]))]
            if found:
                conditions[key] = " ".join(map(str, found))
        conditions["negative"] = " ".join(texts_of(graph, "negative"))
        conditions["masks"] = "given" if self._run.masks else "found"
        return {
            "prompt": prompt,
            "seed": " ".join(map(str, seeds_of(graph))),
            "conditions": conditions,
            "graph": graph,
        }

    def _reference(self, values: Mapping[str, str]) -> dict[str, Any]:
        name = values.get("image") or values.get("note.image")
        if not name:
            raise RowError(
                "reference: the row has neither image nor note.image, so there is nothing to hold it against"
            )
        files = {"reference": name, "reference_mask": values.get("mask") or values.get("note.mask")}
        files["true_mask"] = values.get("note.true_mask")
        paths = {key: self._home / text for key, text in files.items() if text}
        return {**paths, "digests": {key: self._digest(path) for key, path in paths.items()}}

    def _made(self, result: Mapping[str, str], graph: Graph) -> dict[str, Any]:
        """The picture's file, and the mask's."""
        savers = [node for node in graph.values() if node["class_type"] == SAVE_IMAGE]
        first = self._run.folder / result["picture"]
        files = [first, *(first.with_stem(f"{first.stem}~{number}") for number in range(2, len(savers) + 2))]
        files = [path for path in files if path.is_file()]
        if first not in files:
            raise RowError(f"picture: {first} is not there any more; give the `run` command again")
        if len(files) != max(1, len(savers)):
            raise RowError(
                f"picture: {len(files)} files of {len(savers)} Save Image nodes; one of each can be measured"
            )
        are_masks = [_saves_mask(graph, node) for node in savers] if len(savers) > 1 else [False]
        picture = files[are_masks.index(False)] if False in are_masks else files[0]
        found: dict[str, Any] = {"picture": picture, "sha256": self._digest(picture)}
        if picture == first and found["sha256"] != result["sha256"]:
            raise RowError(f"picture: {first} is not the one that the run made; give the `run` command again")
        mask = files[are_masks.index(True)] if True in are_masks else None
        if self._run.masks is not None:
            mask = self._run.masks / Path(result["picture"]).relative_to("images").with_suffix(".png")
            if not mask.is_file():
                raise RowError(f"mask: there is no {mask}")
        if mask is None:
            return found | {"digests": {}}
        return found | {"mask": mask, "digests": {"mask": self._digest(mask)}}

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path]


def _saves_mask(graph: Graph, saver: Mapping[str, Any]) -> bool:
    """Whether what it saves is a mask: Mask to Image, with at most other nodes on images behind it."""
    value, left = saver["inputs"].get("images"), len(graph)
    while is_link(value) and left:
        node, left = graph.get(str(value[0]), {"class_type": "", "inputs": {}}), left - 1
        if node["class_type"] == "MaskToImage":
            return True
        value = node["inputs"].get("image") or node["inputs"].get("images")
    return False
