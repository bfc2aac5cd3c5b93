"""One HTML page of a run: every picture by subject and prompt, what failed and why, timings. Opens from the disk."""

import csv
import html
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from .results import PLAN, RESULTS
from .table import RowError, TableError, read_rows, seeds

NAME = "report.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.sheet { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0 1.6rem }
figure { margin: 0; width: 11rem } img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #eee }
figcaption { font-size: 12px; overflow-wrap: anywhere } h2 { margin-top: 2rem } h3 { margin-bottom: 0 }
pre { white-space: pre-wrap; margin: 0; font-size: 13px }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd } img { background: #333 } }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` beside `results.csv`; its path.

    Raises:
        TableError: There are no results yet.
    """
    if not (folder / RESULTS).is_file():
        raise TableError(f"{folder} has no {RESULTS} yet: it is written when a run ends or is stopped.")
    partial = folder / (NAME + ".part")
    with partial.open("w", encoding="utf-8") as page:
        for part in _page(folder):
            page.write(part)
    partial.replace(folder / NAME)
    return folder / NAME


def _results(folder: Path) -> Iterator[dict[str, str]]:
    with (folder / RESULTS).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _page(folder: Path) -> Iterator[str]:
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    name = html.escape(Path(plan["table"]).name)
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
    yield f"<h1>{name}</h1>"
    yield from _numbers(folder)
    yield from _failures(folder)
    yield from _sheets(folder, _headings(Path(plan["table"])))
    yield "</html>\n"


def _numbers(folder: Path) -> Iterator[str]:
    counts: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for found in _results(folder):
        counts[found["status"]] = counts.get(found["status"], 0) + 1
        if found["status"] == "ok":
            seconds.setdefault(found["worker"], []).append(float(found["seconds"]))
    yield "<table>"
    for state, count in counts.items():
        yield f'<tr><th>{html.escape(state)}<td class="n">{count}'
    yield "</table><h2>Seconds for a picture</h2><table><tr><th>worker<th>pictures<th>median<th>longest"
    for worker, times in sorted(seconds.items()):
        cells = (len(times), f"{statistics.median(times):.2f}", f"{max(times):.2f}")
        yield f"<tr><td>{html.escape(worker)}" + "".join(f'<td class="n">{cell}' for cell in cells)
    yield "</table>"


def _failures(folder: Path) -> Iterator[str]:
    begun = False
    for found in _results(folder):
        if found["status"] in ("ok", "waiting"):
            continue
        if not begun:
            yield "<h2>Failures</h2><table><tr><th>id<th>row<th>status<th>message"
            begun = True
        words = f"{found['node']}: {found['message']}" if found["node"] else found["message"]
        cells = (html.escape(found[key]) for key in ("id", "row", "status"))
        yield "<tr>" + "".join(f"<td>{cell}" for cell in cells) + f"<td><pre>{html.escape(words)}</pre>"
    if begun:
        yield "</table>"


def _headings(table: Path) -> Iterator[tuple[int, str, str, int]]:
    """Per row of the table: its number, subject, prompt, and how many results it has; the table may be gone."""
    try:
        for row in read_rows(table):
            values = row.values
            subject = values.get("subject") or values.get("subject_file") or values.get("image") or ""
            try:
                count = 1 if row.problem else len(seeds(values.get("seed")))
            except RowError:
                count = 1
            yield row.number, subject, values.get("prompt", ""), count
    except TableError:
        return


def _sheets(folder: Path, headings: Iterator[tuple[int, str, str, int]]) -> Iterator[str]:
    """Contact sheets: rows that follow one another with the same subject and prompt are on one."""
    shown: tuple[str, str] | None = None
    subject = ""
    heading = next(headings, None)
    for found in _results(folder):
        while heading is not None and heading[0] < int(found["row"]):
            heading = next(headings, None)
        there = heading is not None and heading[0] == int(found["row"])
        now = (heading[1], heading[2]) if heading is not None and there else ("", "")
        if now != shown:
            yield "</div>" if shown is not None else ""
            if now[0] != subject or shown is None:
                subject = now[0]
                yield f"<h2>{html.escape(subject) or 'Pictures'}</h2>"
            yield f'<h3>{html.escape(now[1])}</h3><div class="sheet">'
            shown = now
        caption = html.escape(found["id"])
        if found["picture"]:
            address = quote(found["picture"])
            yield f'<figure><a href="{address}"><img loading="lazy" src="{address}" alt="{caption}"></a>'
            yield f"<figcaption>{caption}</figcaption></figure>"
        else:
            yield f"<figure><figcaption>{caption}: {html.escape(found['status'])}</figcaption></figure>"
    if shown is not None:
        yield "</div>"
