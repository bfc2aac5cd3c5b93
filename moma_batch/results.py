"""Publishing: files appear whole or not at all, and a result counts once the journal has it."""

import csv
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .index import Index
from .inputs import SERVER_FOLDER
from .jobs import Outcome, Produced, Upload
from .tasks import Task

IMAGES, SUBJECTS, RESULTS, PLAN = "images", "subjects", "results.csv", "plan.json"
PICTURES = ".pictures"
"""How the file ends that has the picture and mask of saved subjects beside it."""
PARTIAL = ".part"
Written = list[dict[str, Any]] | OSError
"""The files of a task as the journal names them, or why they could not be written."""
_COLUMNS = ("id", "row", "status", "picture", "attempts", "node", "message", "worker", "seconds", "sha256", "key", "at")


def write_whole(path: Path, content: bytes, named: str = "") -> None:
    """Write a file that appears only once it is on the disk, in the place of one that was there.

    Args:
        named: What it is called until then, before `PARTIAL`, if several may be written at once in the one's place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name((named or path.name) + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if os.name != "nt":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial(folder: Path) -> None:
    """Remove what a killed driver had begun to write, of which nobody may ever write the whole."""
    for name in (IMAGES, SUBJECTS):
        for path in (folder / name).rglob(f"*{PARTIAL}"):
            path.unlink(missing_ok=True)


def publish(folder: Path, task: Task, files: tuple[Produced, ...]) -> list[dict[str, Any]]:
    """Put what a task made into the run's folder; what the journal is to say of it. Runs beside that of other tasks."""
    published = []
    if task.encodes:
        pictures = next((file for file in files if file.name.endswith(PICTURES)), None)
        place = f"{SUBJECTS}/{pictures.name.removesuffix(PICTURES)[:32]}" if pictures else f"{SUBJECTS}/{task.key[:2]}"
        for file in files:
            name = file.name if file is pictures else f"{task.key}.safetensors"
            published.append((f"{place}/{name}", file.content))
    else:
        for number, file in enumerate(files, 1):
            suffix = Path(file.name).suffix
            published.append((f"{IMAGES}/{task.name}{f'~{number}' if number > 1 else ''}{suffix}", file.content))
    said = []
    for name, content in published:
        path = inside(folder, name)
        digest = hashlib.sha256(content).hexdigest()
        if not (name.endswith(PICTURES) and path.is_file() and path.stat().st_size == len(content)):
            write_whole(path, content, task.key + PICTURES if name.endswith(PICTURES) else "")
        said.append({"name": name, "bytes": len(content), "sha256": digest})
    return said


def published(folder: Path, task: Task, outcome: Outcome) -> Written:
    """Publish what an attempt made, if it ended well."""
    try:
        return publish(folder, task, outcome.files) if outcome.status == "ok" else []
    except OSError as error:
        return error


def why_full(error: OSError) -> str:
    """The words of an error that says that the disk is full; raises any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error
    return str(error)


def inside(folder: Path, name: str) -> Path:
    """A file below the run's folder.

    Raises:
        OSError: A link on the way leads elsewhere.
    """
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path} leads out of {folder} by a link")
    return path


def is_there(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the files of a journal entry are there, with the sizes that they had."""
    try:
        return all((folder / file["name"]).stat().st_size == file["bytes"] for file in entry["files"])
    except OSError:
        return False


def subject_uploads(folder: Path, encoding: Task) -> tuple[str, list[Upload]]:
    """The saved subject of an encoding: how a graph names it, and the files to upload for that."""
    uploads = []
    named = ""
    for file in encoding.result["files"]:
        upload = Upload(f"{SERVER_FOLDER}/{file['name']}", folder / file["name"])
        uploads.append(upload)
        if not upload.name.endswith(PICTURES):
            named = f"{upload.name} [input]"
    return named, uploads


def write_results(folder: Path, index: Index) -> None:
    """Write `results.csv`: one line for each task, in the order of the table."""
    partial = folder / (RESULTS + ".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        for task in index.tasks():
            result = task.result
            first: dict[str, Any] = next(iter(result.get("files", [])), {})
            state = "waiting" if task.state in ("pending", "running") else task.state
            cells = [task.id, task.row, state, first.get("name", ""), result.get("attempt", task.attempts)]
            cells += [result.get("node", ""), _plain(task.message), result.get("worker", ""), result.get("seconds", "")]
            table.writerow([*cells, first.get("sha256", ""), task.key, result.get("at", "")])
    partial.replace(folder / RESULTS)


def _plain(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_plan(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `plan.json`, what the run is."""
    write_whole(folder / PLAN, json.dumps(content, indent=1).encode() + b"\n")
