"""Measuring a run: each picture once by each backbone, in batches; stopped at any moment, it goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..journal import Journal, entries
from ..lock import only_driver
from ..table import RowError
from .backbones import Backbone
from .copies import Copies
from .images import Views, picture_views, reference_views
from .lines import FOLDER, Line, line_of, named, write_lines
from .measure import COPY, Measure, Shown, from_text, to_text
from .samples import Run, Sample
from .summary import write_summary

STORE = "measured.jsonl"
"""What was measured, line by line; the other files of the folder are made of it."""
DEFINITION = 1
"""Of the figures: a change of how they are computed counts up, and everything is measured again."""
_READERS = 4


@dataclass
class Measuring:
    """Measures a run.

    Attributes:
        batch: Pictures on the device at once; each comes in up to three views.
        say: Gets a line now and then.
    """

    run: Run
    backbones: Sequence[Backbone]
    batch: int = 16
    say: Callable[[str], None] = lambda _: None

    def evaluate(self) -> list[Line]:
        """Measure what is not measured, and write figures and summary into the run's folder.

        Raises:
            TableError: The run cannot be read.
            LockedError: Another process measures it.
        """
        samples = self.run.samples()
        folder = self.run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        with only_driver(folder):
            problems = self._measure(samples, folder)
            lines = self._lines(samples, folder, problems)
            backbones = [{"name": one.name, **_measures(one), **one.about} for one in self.backbones]
            write_lines(self.run.folder, samples, lines, {"definition": DEFINITION, "backbones": backbones})
            write_summary(self.run.folder)
        return lines

    def _measure(self, samples: Sequence[Sample], folder: Path) -> dict[str, str]:
        """Why each sample that could not be measured could not."""
        known = {(entry["backbone"], entry["key"]) for entry in entries(folder, STORE)}
        left = [s for s in samples if not s.problem and any((b.name, _key(s)) not in known for b in self.backbones)]
        problems: dict[str, str] = {}
        journal = Journal(folder, STORE)
        measures = [Measure(backbone) for backbone in self.backbones]
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(left), self.batch):
                shown = []
                for sample, found in zip(
                    left[start : start + self.batch], pool.map(_shown, left[start : start + self.batch]), strict=True
                ):
                    if isinstance(found, str):
                        problems[sample.id] = found
                    else:
                        shown.append(found)
                for measure in measures:
                    self._add(
                        measure, [s for s in shown if (measure.backbone.name, _key(s.sample)) not in known], journal
                    )
                self.say(f"{min(start + self.batch, len(left))} of {len(left)} pictures measured")
        journal.close()
        return problems

    def _add(self, measure: Measure, shown: list[Shown], journal: Journal) -> None:
        if not shown:
            return
        name = measure.backbone.name
        for one, found in zip(shown, measure.batch(shown), strict=True):
            entry: dict[str, Any] = {"backbone": name, "key": _key(one.sample), "id": one.sample.id}
            entry |= {"figures": found.figures, "reference": one.reference_key}
            for key, vector in (("around", found.around), ("reference_around", found.reference.around)):
                entry[key] = None if vector is None else to_text(vector)
            journal.add("figures", entry, kept=one is shown[-1])

    def _lines(self, samples: Sequence[Sample], folder: Path, problems: dict[str, str]) -> list[Line]:
        figures: dict[str, dict[str, float]] = {sample.id: {} for sample in samples}
        for backbone in self.backbones:
            wanted = {_key(sample): sample.id for sample in samples if not sample.problem}
            copies = self._copies(folder, backbone.name, wanted)
            for entry in _of(folder, backbone.name, wanted):
                found = dict(entry["figures"])
                around = entry["around"] and from_text(entry["around"])
                copied = None if around is None else copies.of(entry["reference"], around)
                if copied is not None:
                    found[backbone.image_measure + COPY] = copied
                own = {m: v for m, v in found.items() if m.startswith("mask ")}
                rest = {named(m, backbone.name): v for m, v in found.items() if m not in own}
                figures[wanted[entry["key"]]] |= rest | own
        return [line_of(s, s.problem or problems.get(s.id, ""), figures[s.id]) for s in samples]

    def _copies(self, folder: Path, backbone: str, wanted: dict[str, str]) -> Copies:
        found: dict[str, np.ndarray[Any, Any]] = {}
        for entry in _of(folder, backbone, wanted):
            if entry["reference_around"]:
                found.setdefault(entry["reference"], from_text(entry["reference_around"]))
        copies = Copies(found)
        there = (entry for entry in _of(folder, backbone, wanted) if entry["around"])
        copies.add((entry["reference"], from_text(entry["around"])) for entry in there)
        return copies


def _of(folder: Path, backbone: str, wanted: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The entries of a backbone for these keys, each once."""
    seen = set()
    for entry in entries(folder, STORE):
        if entry["backbone"] == backbone and entry["key"] in wanted and entry["key"] not in seen:
            seen.add(entry["key"])
            yield entry


def _measures(backbone: Backbone) -> dict[str, str]:
    return {"image_measure": backbone.image_measure, "text_measure": backbone.text_measure}


def _key(sample: Sample) -> str:
    """SHA-256 of all that decides over a sample's figures, but the backbone."""
    content = [DEFINITION, sample.id, sample.sha256, sorted(sample.digests.items()), sample.prompt]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _shown(sample: Sample) -> Shown | str:
    """The sample with its pictures; or why they cannot be read."""
    try:
        picture, mask_figures = picture_views(sample)
        reference: Views = reference_views(sample)
    except RowError as error:
        return str(error)
    key = f"{sample.digests['reference']}{sample.digests.get('reference_mask', '')}"
    return Shown(sample, picture, reference, hashlib.sha256(key.encode()).hexdigest(), mask_figures)
