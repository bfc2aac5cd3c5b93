"""The tables of docs/batch.md, from `benchmarks/results/batch`: `python3 benchmarks/batch_table.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "batch.md"
RESULTS = ROOT / "benchmarks" / "results" / "batch"
BEGIN, END = "<!-- benchmarks/batch_table.py: begin -->", "<!-- benchmarks/batch_table.py: end -->"
BACKENDS = {"local": "this machine", "ray": "Ray, started here"}

Results = dict[str, Any]
Cells = list[str]


def section() -> str:
    """What the document holds between the marks: the tables of every results file."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text(encoding="utf-8"))) for path in files)


def with_section(text: str) -> str:
    """`text` with the section renewed.

    Raises:
        ValueError: The marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The text has no place for the tables: lines {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def markdown(results: Results) -> str:
    """The machine, then a table for each part."""
    machine = results["machine"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, Ray {machine['ray']}, "
        f"ComfyUI {machine['comfyui']}."
    ]
    for part, (title, make) in TABLES.items():
        if part in results:
            head, *lines = make(results[part])
            rule = ["---"] * len(head)
            note = NOTES[part](results[part]) if part in NOTES else ""
            parts += [f"**{title}**{note}", "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))]
    return "\n\n".join(parts)


def _dispatch(found: Results) -> Iterator[Cells]:
    yield ["workers", "simulated servers", "rows a second", "CPU of the driver for a row", "load before"]
    for name, one in found.items():
        yield [
            BACKENDS[name],
            str(one["servers"]),
            f"{one['rows_per_s']:.0f}",
            f"{one['driver_cpu_ms_per_row']:.1f} ms",
            f"{one['load']:.0f}",
        ]


def _servers(found: Results) -> Iterator[Cells]:
    yield [
        *("workers", "simulated servers", "rows", "mean service time", "efficiency, whole run"),
        *("without start and tail", "load before"),
    ]
    for name, runs in found.items():
        for one in runs:
            shares = [f"{one[kind]:.3f}" for kind in ("whole", "steady")]
            counts = [str(one["servers"]), str(one["rows"]), f"{one['mean_service_s']:.2f} s"]
            yield [BACKENDS[name], *counts, *shares, f"{one['load']:.0f}"]


def _rows(found: Results) -> Iterator[Cells]:
    yield ["what", "until the first row is given out", "CPU of the driver until then", "driver's peak"]
    names = {
        "check": "`check`, nothing known of the pictures (until it ends)",
        "first": f"`run`, of which {found['first']['tasks']} tasks are done and then Ctrl-C",
        "resumed": "`run` again, going on",
    }
    for name, label in names.items():
        one = found[name]
        yield [label, f"{one['start_s']:.0f} s", f"{one['start_cpu_s']:.0f} s", f"{one['peak_mb']:.0f} MB"]


def _real(found: Results) -> Iterator[Cells]:
    yield ["how", "seconds a row", "beside the loop", "driver: after a tenth, at the end", "ComfyUI: the same"]
    names = {"loop": "a bare loop of POST /prompt, all queued at once", **BACKENDS}
    loop = found["loop"]["s_per_row"]
    for name, label in names.items():
        if name in found:
            one = found[name]
            more = "" if name == "loop" else f"{1000 * (one['s_per_row'] - loop):+.0f} ms"
            memory = [_memory(one["memory"].get(process)) for process in ("driver", "server")]
            yield [label, f"{one['s_per_row']:.3f}", more, *memory]


def _memory(found: Results | None) -> str:
    return f"{found['tenth_mb']:.0f} MB, {found['end_mb']:.0f} MB" if found else ""


def _real_note(found: Results) -> str:
    same = ", ".join(f"{BACKENDS[name]} {count}" for name, count in found["same_pixels"].items())
    return (
        f": {found['rows']} rows of {found['steps']} steps. With the loop's pixels: {same}. The first row is left out. "
        f"Load before: {found['load']:.0f}"
    )


def _rows_note(found: Results) -> str:
    counts = f"{found['rows']} rows of {found['photos']} photographs, {found['encodings']} subjects"
    return f": {counts}. Load before: {found['load']:.0f}"


NOTES = {"real": _real_note, "rows": _rows_note}
TABLES = {
    "dispatch": ("Without service time (simulated servers)", _dispatch),
    "servers": ("Log-normal service times (simulated servers)", _servers),
    "rows": ("Very many rows (simulated workers that answer at once)", _rows),
    "real": ("The small world through a real ComfyUI", _real),
}
"""The parts in their order: the table's title, and what makes it."""


def main() -> None:
    """Renew the section."""
    DOCUMENT.write_text(with_section(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
