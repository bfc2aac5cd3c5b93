"""The graph of a task, from what the index keeps of it."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .jobs import Graph, Upload
from .phases import PLACEHOLDER, encodings, without_encoding
from .table import RowError
from .workflow import EXTRACT, LOAD, fill, load_workflow


@functools.lru_cache(maxsize=32)
def workflow_at(path: Path) -> Graph:
    """A workflow, read once."""
    return load_workflow(path)


def whole(workflow: Graph, values: Mapping[str, str], seed: int | None, files: Mapping[str, Upload]) -> Graph:
    """The workflow with a row's values; `files` has the uploads by the text that names them.

    Raises:
        RowError: See `fill`; or there is no place for a saved subject.
    """
    graph = fill(workflow, values, seed, lambda _, text: files[text].name)
    if "subject_file" in values:
        name = f"{files[values['subject_file']].name} [input]"
        loaders = [node for node in graph.values() if node["class_type"] == LOAD]
        extracts = [one for one, node in graph.items() if node["class_type"] == EXTRACT]
        if len(loaders) + len(extracts) != 1:
            raise RowError("subject_file: this workflow has no single node for a saved subject")
        if loaders:
            loaders[0]["inputs"]["subject_name"] = name
        else:
            graph = without_encoding(graph, {extracts[0]: name})
    return graph


def graph_of(spec: Mapping[str, Any]) -> Graph:
    """The graph of a task; `PLACEHOLDER` stands in it for the subjects that it waits for."""
    files = {text: Upload(name, Path(path)) for text, (name, path) in spec["files"].items()}
    graph = whole(workflow_at(Path(spec["workflow"])), spec["values"], spec["seed"], files)
    if node := spec.get("node"):
        return dict(encodings(graph))[node]
    return without_encoding(graph, {node: PLACEHOLDER + key for node, key in spec.get("subjects", {}).items()})


def uploads_of(spec: Mapping[str, Any], graph: Graph) -> tuple[Upload, ...]:
    """The files that a task's graph names."""
    text = json.dumps(graph)
    return tuple(Upload(name, Path(path)) for name, path in spec["files"].values() if name in text)
