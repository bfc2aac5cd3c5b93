"""An API prompt whose inputs are filled from a row."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .jobs import Graph
from .table import RowError, TableError

DEFAULT = Path(__file__).with_name("default.json")
SMALL_WORLD = Path(__file__).with_name("small_world.json")
"""`DEFAULT` with the small weights that come with the pack, for who has no others."""
FILES = {("LoadImage", "image"), ("LoadImageMask", "image")}
"""Inputs that name a picture: what a row gives there is a file to upload."""
EXTRACT, LOAD, SAVE_IMAGE = "MoMAExtractSubject", "MoMALoadSubject", "SaveImage"
MASK_NODE = "moma_batch_mask"

Files = Callable[[str, str], str]
"""Takes a column and the file that a row names there; gives the name that the graph uses."""


def load_workflow(path: Path) -> Graph:
    """Read an API prompt.

    Raises:
        TableError: It is not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TableError(f"workflow {path} cannot be read: {error}") from error
    if isinstance(found, dict) and "nodes" in found and "links" in found:
        raise TableError(f"workflow {path} is in the editor's format: save it with File > Export (API).")
    if not isinstance(found, dict) or not found or not all(_is_node(node) for node in found.values()):
        raise TableError(f"workflow {path} is no API prompt: nodes by id, each with class_type and inputs.")
    return found


def _is_node(node: object) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def fill(workflow: Graph, values: Mapping[str, str], seed: int | None, files: Files) -> Graph:
    """A copy of the workflow with a row's values in it.

    Raises:
        RowError: A column has no place in this workflow, or its value is not of the kind of the one there.
    """
    graph = {name: {**node, "inputs": dict(node["inputs"])} for name, node in workflow.items()}
    for column, text in values.items():
        if column.startswith("set."):
            name, _, key = column.removeprefix("set.").rpartition(".")
            _set(graph, node_called(graph, name, column), key, text, column, files)
        elif column in _PLACES:
            places = list(_PLACES[column](graph))
            if not places:
                raise RowError(f"{column}: this workflow has no input for it; name one as set.NODE.INPUT")
            if len(places) > 1 and column in ("image", "subject"):
                raise RowError(f"{column}: this workflow has {len(places)} inputs for it; name each as set.NODE.INPUT")
            for name, key in places:
                _set(graph, name, key, text, column, files)
    if "mask" in values:
        _set_mask(graph, files("mask", values["mask"]))
    if seed is not None:
        places = list(_seeds(graph))
        if not places:
            raise RowError("seed: this workflow has no sampler with a seed; name the input as set.NODE.INPUT")
        for name, key in places:
            graph[name]["inputs"][key] = seed
    return graph


def _set(graph: Graph, name: str, key: str, text: str, column: str, files: Files) -> None:
    node = graph[name]
    if key not in node["inputs"]:
        raise RowError(
            f"{column}: node {name} ({node['class_type']}) has no input {key!r}: {', '.join(node['inputs'])}"
        )
    if (node["class_type"], key) in FILES:
        node["inputs"][key] = files(column, text)
    else:
        node["inputs"][key] = _value(column, text, node["inputs"][key])


def _value(column: str, text: str, present: Any) -> Any:
    """The text as a value of the kind that is there."""
    kinds: dict[type, tuple[Callable[[str], Any], str]] = {
        bool: ({"true": True, "false": False}.__getitem__, "true or false"),
        int: (_whole, "a whole number"),
        float: (_number, "a number"),
    }
    if type(present) not in kinds:
        return text
    kind, words = kinds[type(present)]
    try:
        return kind(text.strip().lower())
    except (KeyError, ValueError, OverflowError):
        raise RowError(f"{column} is {text[:80]!r}; give {words}") from None


def _whole(text: str) -> int | float:
    """An int; a number with a fraction stays one, as the workflow may hold 1 for an input of fractions."""
    return int(text) if text.lstrip("+-").isdecimal() else _number(text)


def _number(text: str) -> float:
    number = float(text)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(text)
    return number


def node_called(graph: Graph, name: str, column: str) -> str:
    """A node by id or title."""
    if name in graph:
        return name
    titled = [found for found, node in graph.items() if node.get("_meta", {}).get("title") == name]
    if len(titled) != 1:
        found = ", ".join(f"{key} ({node.get('_meta', {}).get('title', '')})" for key, node in graph.items())
        raise RowError(f"{column}: {len(titled)} nodes are called {name!r}; the nodes are {found[:600]}")
    return titled[0]


def _of(*places: tuple[str, str]) -> Callable[[Graph], Iterator[tuple[str, str]]]:
    """The inputs of these (class, input) pairs that are values, of the first pair that the graph has."""

    def find(graph: Graph) -> Iterator[tuple[str, str]]:
        for kind, key in places:
            found = [(n, key) for n, node in graph.items() if node["class_type"] == kind and key in node["inputs"]]
            if found:
                yield from found
                return

    return find


def _text_behind(*keys: str) -> Callable[[Graph], Iterator[tuple[str, str]]]:
    """The texts of the encoders that lead to an input of this name."""

    def find(graph: Graph) -> Iterator[tuple[str, str]]:
        starts = [node["inputs"][key] for node in graph.values() for key in keys if is_link(node["inputs"].get(key))]
        seen: set[str] = set()
        while starts:
            name = str(starts.pop()[0])
            if name in seen or name not in graph:
                continue
            seen.add(name)
            inputs = graph[name]["inputs"]
            if isinstance(inputs.get("text"), str):
                yield name, "text"
            else:
                starts += [value for key, value in inputs.items() if is_link(value) and key in ("conditioning", *keys)]

    return find


def _prompts(graph: Graph) -> Iterator[tuple[str, str]]:
    own = list(_of((EXTRACT, "prompt"), ("MoMATextEncode", "prompt"))(graph))
    yield from own or _text_behind("positive")(graph)


def _seeds(graph: Graph) -> Iterator[tuple[str, str]]:
    for name, node in graph.items():
        inputs = node["inputs"]
        for key in ("seed", "noise_seed"):
            if type(inputs.get(key)) is int and (key == "noise_seed" or "steps" in inputs or "sampler_name" in inputs):
                yield name, key


def has_seed(graph: Graph) -> bool:
    """Whether a row's seed goes into it."""
    return any(True for _ in _seeds(graph))


_PLACES: dict[str, Callable[[Graph], Iterator[tuple[str, str]]]] = {
    "image": _of(("LoadImage", "image")),
    "subject": _of((EXTRACT, "subject")),
    "prompt": _prompts,
    "negative": _text_behind("negative"),
    "strength": _of(("MoMASelfAttnShortcut", "strength")),
    "weight": _of(("MoMAApplyAdapter", "weight")),
    "checkpoint": _of(("CheckpointLoaderSimple", "ckpt_name"), ("MoMALoadMini", "ckpt_name")),
}


def texts_of(graph: Graph, column: str) -> list[str]:
    """The texts where `column` has its places: prompt, negative, ..."""
    return [str(graph[name]["inputs"][key]) for name, key in _PLACES[column](graph)]


def seeds_of(graph: Graph) -> list[int]:
    """The seeds of its samplers."""
    return [int(graph[name]["inputs"][key]) for name, key in _seeds(graph)]


def _set_mask(graph: Graph, file: str) -> None:
    """A mask of its own: into the workflow's LoadImageMask, else through a new one into Extract Subject Features."""
    places = list(_of(("LoadImageMask", "image"))(graph))
    extracts = [name for name, node in graph.items() if node["class_type"] == EXTRACT]
    if len(places) == 1:
        graph[places[0][0]]["inputs"]["image"] = file
    elif not places and len(extracts) == 1:
        graph[MASK_NODE] = {"class_type": "LoadImageMask", "inputs": {"image": file, "channel": "red"}}
        graph[extracts[0]]["inputs"]["mask"] = [MASK_NODE, 0]
    else:
        raise RowError("mask: this workflow has no single place for a mask; name the input as set.NODE.INPUT")


def is_link(value: object) -> bool:
    """Whether an input is the output of another node."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


def upstream(graph: Graph, name: str) -> set[str]:
    """A node and all that it needs."""
    found, left = set(), [name]
    while left:
        one = left.pop()
        if one not in found and one in graph:
            found.add(one)
            left += [str(value[0]) for value in graph[one]["inputs"].values() if is_link(value)]
    return found


def with_prefix(graph: Graph, prefix: str) -> Graph:
    """A copy in which every SaveImage writes below this prefix, so that no attempt is answered from a cache."""
    graph = {name: {**node, "inputs": dict(node["inputs"])} for name, node in graph.items()}
    savers = [node for node in graph.values() if node["class_type"] == SAVE_IMAGE]
    for number, node in enumerate(savers):
        node["inputs"]["filename_prefix"] = f"{prefix}_{number}" if number else prefix
    return graph
