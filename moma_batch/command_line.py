"""The commands: check, run, status, retry, report; those of `evaluate/` beside them."""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from .driver import OK, SOME_FAILED, USAGE, Driver, Limits
from .evaluate.command import add_commands
from .index import Index
from .journal import Journal, entries
from .lock import LockedError, is_held, only_driver
from .models import Weights, find_comfyui
from .plan import Planner, replay
from .progress import Progress
from .report import write_report
from .results import PLAN, is_there, remove_partial, write_plan, write_results
from .retry import FAILED, to_retry
from .server import GoneError, Server
from .space import Space
from .table import TableError
from .workers import MEGABYTE, backend_for, check_choice, choose_workflow

VERSION = 1


def main(words: list[str]) -> int:
    """Run what the command line asks for; the exit status."""
    options = _parser().parse_args(words)
    try:
        return int(options.command(options))
    except (TableError, LockedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moma_batch", description="Many rows of a table through ComfyUI.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="make every picture that is not there; the same command resumes")
    check = commands.add_parser("check", help="read the table and say what is wrong with it; runs nothing")
    for command in (run, check):
        command.add_argument("table", type=Path, help=".csv, .jsonl or .parquet")
        command.add_argument("--out", type=Path, required=True, help="the run's folder")
        command.add_argument("--workflow", type=Path, help="an API prompt, for rows that name none")
        command.add_argument("--inputs", type=Path, action="append", default=[], help="one more folder with pictures")
        command.add_argument("--one-phase", action="store_true", help="do not encode the subjects first")
        command.add_argument("--comfyui", type=Path, help="the folder of the ComfyUI to start")
        command.add_argument("--comfyui-args", default="", help="more for ComfyUI's command line, in one argument")
        command.add_argument("--address", help="a Ray cluster: auto, HOST:PORT, ray://HOST:PORT; local for none")
        command.add_argument("--server", action="append", default=[], metavar="URL", help="a server that runs already")
        command.add_argument("--keep-free", type=int, default=256, metavar="MB", help="what stays free on the disk")
    run.add_argument("--only", choices=("encode", "sample"), help="one phase alone")
    run.add_argument("--workers", type=int, help="how many ComfyUIs to start; default: one for each card, else one")
    run.add_argument("--python", help="the Python that can run ComfyUI")
    run.add_argument("--timeout", type=float, default=1800, help="seconds after which a prompt counts as hung")
    run.add_argument("--server-wait", type=float, default=300, help="seconds to wait for a server that is away")
    run.add_argument("--restart-after", type=int, default=0, help="start a ComfyUI anew after so many prompts")
    run.add_argument("--max-memory", type=int, default=0, metavar="MB", help="start a ComfyUI anew that holds more")
    run.set_defaults(command=_run)
    check.set_defaults(command=_check)
    for name, command_, help_ in (
        ("status", _status, "say how far a run is"),
        ("retry", _retry, "let the next run try failed rows again"),
        ("report", _report, "write report.html"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("--out", type=Path, required=True, help="the run's folder")
        command.set_defaults(command=command_)
        if name == "retry":
            command.add_argument("ids", nargs="*", metavar="ID", help="rows by id; without any, all that failed")
    add_commands(commands)
    return parser


def _planner(options: argparse.Namespace, index: Index) -> Planner:
    elsewhere = options.server or options.address
    identity = (lambda _: []) if elsewhere else Weights(find_comfyui(options.comfyui)).identity
    workflow = options.workflow.resolve()
    return Planner(options.table, index, workflow, options.inputs, identity, not options.one_phase)


def _prepared(options: argparse.Namespace, index: Index) -> int:
    """Plan, and take over what the journal knows; how many rows there are."""
    rows = _planner(options, index).plan()
    for line in replay(options.out, index, lambda entry: is_there(options.out, entry)):
        print(line, file=sys.stderr)
    index.group()
    return rows


def _check(options: argparse.Namespace) -> int:
    choose_workflow(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with only_driver(options.out), contextlib.closing(Index(options.out)) as index:
        rows = _prepared(options, index)
        bad = [task for task in index.tasks() if task.state == "invalid"] if index.counts(False).get("invalid") else []
        for task in bad:
            print(f"row {task.row} ({task.id}): {task.message}")
        missing = _missing_nodes(options)
        for line in missing:
            print(line)
        pictures, subjects = index.counts(False), index.counts(True)
        print(
            f"{rows} rows: {sum(pictures.values())} pictures, {sum(subjects.values())} subjects to encode, "
            f"{pictures.get('ok', 0)} pictures done, {len(bad)} rows cannot be used."
        )
        if space := _space(options, index).line():
            print(space)
        return SOME_FAILED if bad or missing else OK


def _space(options: argparse.Namespace, index: Index) -> Space:
    return Space(options.out, index, options.keep_free * MEGABYTE, not (options.server or options.address))


def _missing_nodes(options: argparse.Namespace) -> list[str]:
    """What the servers of the command line lack for the workflow."""
    wanted = {node["class_type"] for node in json.loads(options.workflow.read_text(encoding="utf-8-sig")).values()}
    lines = []
    for url in options.server:
        try:
            lacking = sorted(wanted - Server(url).node_classes())
        except GoneError as error:
            lines.append(str(error))
            continue
        if lacking:
            lines.append(f"{url} does not have the nodes {', '.join(lacking)}")
    return lines


def _run(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    check_choice(options)
    choose_workflow(options)
    with only_driver(options.out), contextlib.closing(Index(options.out)) as index:
        remove_partial(options.out)
        journal = Journal(options.out)
        rows = _prepared(options, index)
        run_id = _run_id(options.out)
        content = {"version": VERSION, "run": run_id, "table": str(options.table.resolve()), "rows": rows}
        content |= {"pictures": sum(index.counts(False).values()), "subjects": sum(index.counts(True).values())}
        backend = backend_for(options, run_id)
        content |= {"workers": list(backend.names), "workflow": str(options.workflow.resolve())}
        write_plan(options.out, content)
        progress = Progress(lambda: (index.counts(True), index.counts(False)))
        space = _space(options, index)
        if line := space.line():
            progress.line(line)
        journal.add("run", {"host": socket.gethostname(), "pid": os.getpid(), "workers": content["workers"]})
        encodes = {None: None, "encode": True, "sample": False}[options.only]
        limits = Limits(options.timeout, options.keep_free * MEGABYTE, encodes)

        def tick() -> None:
            progress.tick()
            space.look(progress.line)

        driver = Driver(options.out, run_id, index, journal, backend, limits, progress.line, tick)
        with _signals(driver, progress):
            status = driver.run()
        progress.tick(now=True)
        with contextlib.suppress(OSError):  # a full disk: the next run writes it
            write_results(options.out, index)
        journal.close()
        return status


def _run_id(folder: Path) -> str:
    try:
        return str(json.loads((folder / PLAN).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError):
        return uuid.uuid4().hex


@contextlib.contextmanager
def _signals(driver: Driver, progress: Progress) -> Iterator[None]:
    """Ctrl-C, and what Slurm and Kubernetes send before they end a process."""

    def asked(number: int, frame: FrameType | None) -> None:
        driver.stop()
        text = "Ending what runs; Ctrl-C once more stops it at once." if driver.stops == 1 else "Stopping at once."
        progress.line(text)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, asked) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _plan_of(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise TableError(f"{folder} is no folder of a run: {error}") from error


def _status(options: argparse.Namespace) -> int:
    plan = _plan_of(options.out)
    states: dict[str, dict[str, str]] = {"pictures": {}, "subjects": {}}
    for entry in entries(options.out):
        if entry["event"] in ("end", "retry"):
            kind = "subjects" if str(entry["task"]).startswith("encoding:") else "pictures"
            states[kind][str(entry["task"])] = str(entry.get("status", "waiting"))
    for kind, found in states.items():
        counts = {state: list(found.values()).count(state) for state in ("ok", *FAILED)}
        said = ", ".join(f"{state} {count}" for state, count in counts.items() if count) or "none yet"
        print(f"{kind}: {said}, of {plan[kind]}")
    print("A driver works in the folder." if is_held(options.out) else "No driver works in the folder.")
    return OK


def _retry(options: argparse.Namespace) -> int:
    _plan_of(options.out)
    with only_driver(options.out):
        chosen = to_retry(options.out, options.ids)
        journal = Journal(options.out)
        for task in chosen:
            journal.add("retry", {"task": task})
        journal.close()
        print(f"The next run tries {len(chosen)} again.")
    return OK


def _report(options: argparse.Namespace) -> int:
    _plan_of(options.out)
    print(f"Wrote {write_report(options.out)}")
    return OK
