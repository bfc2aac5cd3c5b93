"""A graph that looks at a subject, as two: one that encodes it, one that samples with the saved result.

The language model is needed for the first only; rows that differ in seed, strength or sampler share it.
"""

import re
from collections.abc import Iterator

from .jobs import Graph
from .workflow import EXTRACT, LOAD, is_link, upstream

SAVER = "moma_batch_save"
_CHOICE = re.compile(r"\{[^{}]*\|")
PLACEHOLDER = "moma_batch subject "
"""Stands in a graph for the file of a saved subject until it is there; the encoding's key follows."""


def encodings(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """The nodes that look at a subject, each with the graph that does only this and saves the result.

    A text such as `{beach|city}` is decided anew in each run, so nothing of it can be shared: such a graph stays whole.
    """
    found = [name for name, node in graph.items() if node["class_type"] == EXTRACT]
    texts = [value for name in found for value in graph[name]["inputs"].values() if isinstance(value, str)]
    if any(_CHOICE.search(text) for text in texts):
        return
    for name in found:
        needed = upstream(graph, name)
        if any(graph[one]["class_type"] == EXTRACT for one in needed - {name}):
            continue
        part = {one: graph[one] for one in graph if one in needed}
        inputs = {"subject": [name, 0], "filename_prefix": "", "separate_pictures": True}
        yield name, {**part, SAVER: {"class_type": "MoMASaveSubject", "inputs": inputs}}


def without_encoding(graph: Graph, subjects: dict[str, str]) -> Graph:
    """The graph with saved subjects in the place of the nodes that look at them.

    Args:
        subjects: Per node, what stands for the file of its subject. What only that node needed goes too.
    """
    kept = dict(graph)
    for name, subject in subjects.items():
        above = upstream(graph, name) - {name}
        kept[name] = {"class_type": LOAD, "inputs": {"subject_name": subject}}
        while unused := (above & kept.keys()) - _used(kept):
            for one in unused:
                del kept[one]
    return kept


def _used(graph: Graph) -> set[str]:
    """The nodes whose outputs others take."""
    return {str(v[0]) for node in graph.values() for v in node["inputs"].values() if is_link(v)}


def with_subjects(graph: Graph, files: dict[str, str]) -> Graph:
    """Put the names of saved subjects, by the keys of their encodings, where `PLACEHOLDER` stands."""
    done = {}
    for name, node in graph.items():
        value = node["inputs"].get("subject_name")
        if node["class_type"] == LOAD and isinstance(value, str) and value.startswith(PLACEHOLDER):
            node = {**node, "inputs": {**node["inputs"], "subject_name": files[value.removeprefix(PLACEHOLDER)]}}
        done[name] = node
    return done
