"""A graph that looks at a subject, as two: one that encodes it, one that samples with the saved result.

The language model is needed for the first only; rows that differ in seed, strength or sampler share it. Several words
and prompts about one picture go to it in one graph, as a list, of which it makes one forward.
"""

import re
from collections.abc import Iterator, Sequence

from .jobs import Graph
from .workflow import EXTRACT, LOAD, is_link, upstream

SAVER = "moma_batch_save"
TOGETHER = 10
"""So many subjects of one picture are encoded in one graph: what one Create List takes."""
_TEXTS = ("subject", "prompt")
"""What Extract Subject Features may have a list of."""
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


def are_alike(graph: Graph, other: Graph) -> bool:
    """Whether two graphs of `encodings` differ in word and prompt alone, so that `together` can join them."""
    return _without_texts(graph) == _without_texts(other)


def _without_texts(graph: Graph) -> Graph:
    name = _looks(graph)
    node = graph[name]
    blank = {key: "" for key in _TEXTS if isinstance(node["inputs"].get(key), str)}
    return {**graph, name: {**node, "inputs": {**node["inputs"], **blank}}}


def together(graphs: Sequence[Graph], prefixes: Sequence[str]) -> Graph:
    """One graph for several of `encodings`, all alike, that saves each one's subject under its prefix."""
    graph, name = dict(graphs[0]), _looks(graphs[0])
    given = {key: [one[name]["inputs"].get(key) for one in graphs] for key in _TEXTS}
    lists = {key: texts for key, texts in given.items() if len(set(map(str, texts))) > 1}
    for node, key, texts in [*((name, *item) for item in lists.items()), (SAVER, "filename_prefix", list(prefixes))]:
        inputs = {f"inputs.input{number}": text for number, text in enumerate(texts)}
        graph[f"moma_batch_{key}"] = {"class_type": "CreateList", "inputs": inputs}
        graph[node] = {**graph[node], "inputs": {**graph[node]["inputs"], key: [f"moma_batch_{key}", 0]}}
    return graph


def _looks(graph: Graph) -> str:
    """The node that looks at the subject, of a graph of `encodings`."""
    return str(graph[SAVER]["inputs"]["subject"][0])
