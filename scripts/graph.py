"""Workflows from compact descriptions: the editor's format, the API's, and blueprints, by the live `/object_info`."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfyui_source import NEWEST, ROOT

Json = dict[str, Any]

NOTES = Path(__file__).parent / "notes"

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTE = "MarkdownNote"
GAP, TITLE, TOP = 30, 30, 60
FRAME, FRAME_TITLE, FRAME_COLOUR = 14, 40, "#3f789e"
"""Of a group: how far it reaches around its nodes, what its title takes above them, and the editor's own colour."""
ROW, TEXT, PICTURE, SHOWN_TEXT, PADDING = 24, 110, 220, 50, 16
SHOW_PICTURES = {"SaveImage", "LoadImage", "MoMASubjectMask", "MoMAExtractSubject", "MoMAContactSheet"}
SHOW_TEXT = {"MoMATextEncode", "MoMAExtractSubject", "MoMALoadMLLM"}
OPTIONAL_SHAPE = 7
"""How the editor marks a socket that may stay unconnected."""
APP_OUTPUT = "SaveImage"
"""Nodes whose results the editor's app view shows."""
RUNS, MUTED, BYPASSED = 0, 2, 4
"""The editor's modes of a node. A muted one stays out of what is queued, and so do the links from it; past a bypassed
one go its inputs, each to an output of its type."""


@dataclass(frozen=True)
class Model:
    """A file that a node loads, and where the editor can offer it from."""

    name: str
    url: str
    directory: str

    def metadata(self) -> Json:
        """As the editor keeps it in a node's properties."""
        return {"name": self.name, "url": self.url, "directory": self.directory}


@dataclass(frozen=True)
class Output:
    """One output of a node."""

    node: "Node"
    name: str


@dataclass
class Node:
    """A node of a described graph.

    Attributes:
        values: By input name: a widget's value, or the `Output` that is connected. Others keep their defaults.
        column: Where it stands; columns run from left to right, nodes in one from top to bottom.
        asks: The widgets that the editor's app view asks for.
        mode: How it opens; if not `RUNS`, in sight and wired, for the user to turn on.
    """

    id: int
    kind: str
    column: int
    values: Json
    title: str | None = None
    models: Sequence[Model] = ()
    tall: int | None = None
    asks: Sequence[str] = ()
    mode: int = RUNS

    def out(self, name: str) -> Output:
        """The output of this name."""
        return Output(self, name)


@dataclass
class Graph:
    """A described workflow; `ui` and `api` need the definitions of its nodes.

    Attributes:
        widths: Of its columns.
        before: How many columns stand before column 0, as -1, -2 and so on.
        groups: What is written over each column, which is a group; empty: no group.
    """

    name: str
    widths: Sequence[int]
    before: int = 0
    groups: Sequence[str] = ()
    nodes: list[Node] = field(default_factory=list)

    def add(self, kind: str, column: int, *, id: int | None = None, **values: Any) -> Node:
        """Add a node. Those of the values that are attributes of `Node` are its own, the rest its inputs."""
        number = id if id is not None else max((node.id for node in self.nodes), default=0) + 1
        own = {key: values.pop(key) for key in ("title", "models", "tall", "asks", "mode") if key in values}
        node = Node(number, kind, column + self.before, values, **own)
        self.nodes.append(node)
        return node

    def note(self, column: int, height: int, *parts: str) -> Node:
        """Add the note for the reader: the one of its name in `notes/`, then these parts of there."""
        texts = [(NOTES / f"{name}.md").read_text(encoding="utf-8").strip() for name in (self.name, *parts)]
        return self.add(NOTE, column, title="How to", tall=height, text="\n\n".join(texts))

    def api(self, info: Json, prefix: str = "", turned_on: bool = False) -> Json:
        """The prompt as `POST /prompt` takes it; `prefix` comes before every id.

        Args:
            turned_on: Whether the nodes that open muted or bypassed are in it.
        """
        prompt: Json = {}
        left_out = {node.id for node in self.nodes if node.kind == NOTE or (node.mode != RUNS and not turned_on)}
        for node in self.nodes:
            if node.id in left_out:
                continue
            spec = NodeSpec.of(info, node.kind)
            inputs = {w.name: node.values.get(w.name, w.default) for w in spec.widgets if not _linked(node, w.name)}
            for name in spec.order:
                source = node.values[name] if _linked(node, name) else None
                while source and source.node.id in left_out:
                    source = _past(source, info)
                if source:
                    slot = NodeSpec.of(info, source.node.kind).output_slot(source.name)
                    inputs[name] = [f"{prefix}{source.node.id}", slot]
            _check(node, spec)
            meta = {"title": node.title or spec.display_name}
            prompt[f"{prefix}{node.id}"] = {"inputs": inputs, "class_type": node.kind, "_meta": meta}
        return prompt

    def ui(self, info: Json) -> Json:
        """The workflow as the editor saves it."""
        drawn = _Drawing(self, info)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"moma/{self.name}")),
            "revision": 0,
            "last_node_id": max(node.id for node in self.nodes),
            "last_link_id": len(drawn.links),
            "nodes": drawn.nodes,
            "links": [list(link) for link in drawn.links],
            "groups": drawn.groups(),
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": [30, 60]}, "linearMode": False, "linearData": self._app(info)},
            "version": 0.4,
        }

    def _app(self, info: Json) -> Json:
        """What the editor's app view has of this graph: widgets as (node, name), and nodes with results."""
        asked = [(node, name) for node in self.nodes for name in node.asks if node.mode == RUNS]
        for node, name in asked:
            if _linked(node, name) or name not in [widget.name for widget in NodeSpec.of(info, node.kind).widgets]:
                raise ValueError(f"{node.kind} {node.id}: the app view cannot ask for {name}: it is no widget.")
        inputs = [[node.id, name] for node, name in asked]
        return {"inputs": inputs, "outputs": [node.id for node in self.nodes if node.kind == APP_OUTPUT]}

    def blueprint(self, info: Json, text: "BlueprintText", inputs: Sequence["Port"], outputs: Sequence["Port"]) -> Json:
        """The graph inside one node of its own.

        Args:
            inputs: What the node takes; several places inside may share one.
            outputs: What it gives; the first place of each is used.
        """
        return _Blueprint(self, info, text, inputs, outputs).workflow()


@dataclass(frozen=True)
class Port:
    """An input or output of a blueprint, and the inputs or outputs (node, name) that it stands for."""

    name: str
    places: Sequence[tuple[Node, str]]


@dataclass(frozen=True)
class BlueprintText:
    """What the editor shows of a blueprint."""

    name: str
    description: str
    category: str


@dataclass(frozen=True)
class Widget:
    """A widget input: its default, and the values of widgets that the editor adds after it."""

    name: str
    type: str
    default: Any
    extra: tuple[Any, ...]
    height: int


@dataclass(frozen=True)
class NodeSpec:
    """What `/object_info` says of a node."""

    display_name: str
    order: list[str]
    sockets: list[tuple[str, str, bool]]
    widgets: list[Widget]
    outputs: list[tuple[str, str]]
    shows_pictures: bool
    shows_text: bool
    module: str

    @classmethod
    def of(cls, info: Json, kind: str) -> "NodeSpec":
        """The specification of a class.

        Raises:
            KeyError: The server does not know it.
        """
        if kind == NOTE:
            return cls("Markdown Note", ["text"], [], [Widget("text", "STRING", "", (), 0)], [], False, False, "")
        node = info[kind]
        order, sockets, widgets = [], [], []
        for group in ("required", "optional"):
            for name, given in node["input"].get(group, {}).items():
                options = given[1] if len(given) > 1 else {}
                type_ = "COMBO" if isinstance(given[0], list) else given[0]
                order.append(name)
                if type_ in WIDGETS and not options.get("forceInput"):
                    widgets.append(_widget(name, type_, given[0], options))
                else:
                    sockets.append((name, type_, group == "optional"))
        outputs = list(zip(node["output_name"], node["output"], strict=True))
        pictures = kind in SHOW_PICTURES
        return cls(
            node["display_name"], order, sockets, widgets, outputs, pictures, kind in SHOW_TEXT, node["python_module"]
        )

    def output_slot(self, name: str) -> int:
        """The number of the output of this name."""
        return [output for output, _ in self.outputs].index(name)

    def height(self) -> int:
        """A height in which the editor has room for everything."""
        rows = max(len(self.sockets), len(self.outputs))
        shown = (PICTURE if self.shows_pictures else 0) + (SHOWN_TEXT if self.shows_text else 0)
        return rows * 20 + sum(w.height for w in self.widgets) + shown + PADDING


def _widget(name: str, type_: str, options_or_type: Any, options: Json) -> Widget:
    choices = options_or_type if isinstance(options_or_type, list) else options.get("options", [])
    default = options.get("default", choices[0] if choices else {"STRING": "", "BOOLEAN": False}.get(type_, 0))
    extra: tuple[Any, ...] = ()
    if options.get("control_after_generate") or (type_ == "INT" and name in ("seed", "noise_seed")):
        extra = ("fixed",)
    elif options.get("image_upload"):
        extra = ("image",)
    height = TEXT if options.get("multiline") else ROW * (1 + len(extra))
    return Widget(name, type_, default, extra, height)


def _past(output: Output, info: Json) -> Output | None:
    """What comes in place of the output of a node that is off, as the editor finds it; None: nothing."""
    if output.node.mode != BYPASSED:
        return None
    spec = NodeSpec.of(info, output.node.kind)
    slot = spec.output_slot(output.name)
    sockets = [
        name for name, type_, _ in [*spec.sockets[slot : slot + 1], *spec.sockets] if type_ == spec.outputs[slot][1]
    ]
    given = output.node.values.get(sockets[0]) if sockets else None
    return given if isinstance(given, Output) else None


def _linked(node: Node, name: str) -> bool:
    return isinstance(node.values.get(name), Output)


def _check(node: Node, spec: NodeSpec) -> None:
    unknown = set(node.values) - set(spec.order) - {"control_after_generate"}
    unconnected = [name for name, _, optional in spec.sockets if not optional and name not in node.values]
    if unknown or unconnected:
        raise ValueError(f"{node.kind} {node.id}: no such inputs: {sorted(unknown)}; not connected: {unconnected}.")


def _version() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split('\nversion = "', 1)[1].split('"', 1)[0]


Link = tuple[int, Any, int, Any, int, str]


class _Drawing:
    """Nodes with places, sizes and numbered links."""

    def __init__(self, graph: Graph, info: Json) -> None:
        self.graph, self.info = graph, info
        self.links: list[Link] = []
        self.specs = {node.id: NodeSpec.of(info, node.kind) for node in graph.nodes}
        self._incoming: dict[tuple[int, str], int] = {}
        self._outgoing: dict[tuple[int, int], list[int]] = {}
        for node in graph.nodes:
            for name, value in node.values.items():
                if isinstance(value, Output):
                    self._connect(node, name, value)
        positions = _positions(graph, self.specs)
        self.nodes = [
            self._node(node, order, positions[node.id], graph.widths[node.column])
            for order, node in enumerate(graph.nodes)
        ]

    def groups(self) -> list[Json]:
        """The columns that have a title, each as a group around its nodes."""
        drawn: list[Json] = []
        for column, title in enumerate(self.graph.groups):
            inside = [place for node, place in zip(self.graph.nodes, self.nodes, strict=True) if node.column == column]
            if title and inside:
                bottom = max(node["pos"][1] + node["size"][1] for node in inside)
                top = TOP - TITLE - FRAME_TITLE
                bounding = [
                    inside[0]["pos"][0] - FRAME,
                    top,
                    self.graph.widths[column] + 2 * FRAME,
                    bottom + FRAME - top,
                ]
                group = {"id": len(drawn) + 1, "title": title, "bounding": bounding, "color": FRAME_COLOUR}
                drawn.append({**group, "font_size": 24, "flags": {}})
        return drawn

    def input_slot(self, node: Node, name: str) -> int:
        """The number of an input as the editor counts: sockets first, then widgets."""
        spec = self.specs[node.id]
        return ([socket for socket, *_ in spec.sockets] + [widget.name for widget in spec.widgets]).index(name)

    def _connect(self, node: Node, name: str, source: Output) -> None:
        spec = self.specs[source.node.id]
        slot = spec.output_slot(source.name)
        number = len(self.links) + 1
        self.links.append((number, source.node.id, slot, node.id, self.input_slot(node, name), spec.outputs[slot][1]))
        self._incoming[node.id, name] = number
        self._outgoing.setdefault((source.node.id, slot), []).append(number)

    def _node(self, node: Node, order: int, place: tuple[int, int, int], width: int) -> Json:
        spec = self.specs[node.id]
        x, y, height = place
        drawn: Json = {"id": node.id, "type": node.kind, "pos": [x, y], "size": [width, height], "flags": {}}
        drawn |= {"order": order, "mode": node.mode}
        drawn["inputs"] = [] if node.kind == NOTE else self._inputs(node, spec)
        drawn["outputs"] = [
            {"localized_name": name, "name": name, "type": type_, "links": self._outgoing.get((node.id, slot))}
            for slot, (name, type_) in enumerate(spec.outputs)
        ]
        if node.title:
            drawn["title"] = node.title
        drawn["properties"] = _properties(node, spec)
        if spec.widgets:
            drawn["widgets_values"] = _widget_values(node, spec)
        if node.kind == NOTE:
            drawn |= {"color": "#432", "bgcolor": "#653"}
        return drawn

    def _inputs(self, node: Node, spec: NodeSpec) -> list[Json]:
        drawn: list[Json] = []
        for name, type_, optional in spec.sockets:
            socket = {"localized_name": name, "name": name, "type": type_, "link": self._incoming.get((node.id, name))}
            drawn.append({**socket, "shape": OPTIONAL_SHAPE} if optional else socket)
        for widget in spec.widgets:
            link = self._incoming.get((node.id, widget.name))
            socket = {"localized_name": widget.name, "name": widget.name, "type": widget.type}
            drawn.append({**socket, "widget": {"name": widget.name}, "link": link})
        return drawn


def _positions(graph: Graph, specs: Mapping[int, NodeSpec]) -> dict[int, tuple[int, int, int]]:
    """Per node id: x, y, height."""
    left, below = [0], [TOP] * len(graph.widths)
    for width in graph.widths:
        left.append(left[-1] + width + 2 * GAP)
    places = {}
    for node in graph.nodes:
        height = node.tall or specs[node.id].height()
        places[node.id] = (left[node.column], below[node.column], height)
        below[node.column] += height + TITLE + GAP
    return places


def _properties(node: Node, spec: NodeSpec) -> Json:
    if node.kind == NOTE:
        return {}
    ours = spec.module.startswith("custom_nodes")
    properties: Json = {"Node name for S&R": node.kind}
    properties |= {"cnr_id": "moma", "ver": _version()} if ours else {"cnr_id": "comfy-core", "ver": NEWEST}
    if node.models:
        properties["models"] = [model.metadata() for model in node.models]
    return properties


def _widget_values(node: Node, spec: NodeSpec) -> list[Any]:
    values: list[Any] = []
    for widget in spec.widgets:
        given = node.values.get(widget.name, widget.default)
        values.append(widget.default if isinstance(given, Output) else given)
        extra = widget.extra
        if extra == ("fixed",):
            extra = (node.values.get("control_after_generate", "fixed"),)
        values += extra
    return values


class _Blueprint:
    """A graph as the definition of a subgraph, and a workflow with that one node."""

    def __init__(
        self, graph: Graph, info: Json, text: BlueprintText, inputs: Sequence[Port], outputs: Sequence[Port]
    ) -> None:
        self.graph, self.text, self.inputs, self.outputs = graph, text, inputs, outputs
        self.drawn = _Drawing(graph, info)
        self.id = self._uuid("definition")
        self.links: list[Link] = list(self.drawn.links)
        self.by_id = {node["id"]: node for node in self.drawn.nodes}
        self.ports_in = [self._input(slot, port) for slot, port in enumerate(inputs)]
        self.ports_out = [self._output(slot, port) for slot, port in enumerate(outputs)]

    def workflow(self) -> Json:
        """A workflow that holds the blueprint's node alone.

        The node has the values of its widgets, in the order of its inputs. It has no list of widgets inside
        (`proxyWidgets`): newer editors turn one into inputs, and ComfyUI 0.16's takes it for widgets without an input.
        """
        # Not one of the ids inside, which the editor would change.
        number = max(self.by_id) + 1
        node: Json = {"id": number, "type": self.id, "pos": [0, TOP], "size": [400, 600]}
        node |= {"flags": {}, "order": 0, "mode": 0}
        node["inputs"] = [self._node_input(drawn, port) for drawn, port in zip(self.ports_in, self.inputs, strict=True)]
        node["outputs"] = [{"name": p["name"], "type": p["type"], "links": []} for p in self.ports_out]
        node |= {"title": self.text.name, "properties": {"cnr_id": "moma", "ver": _version()}}
        node["widgets_values"] = [self._value(port) for port in self.inputs if self._is_widget(port)]
        return {
            "id": self._uuid("workflow"),
            "revision": 0,
            "last_node_id": number,
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [self._definition()]},
            "extra": {},
        }

    def _definition(self) -> Json:
        state = {"lastGroupId": 0, "lastNodeId": max(self.by_id), "lastLinkId": len(self.links), "lastRerouteId": 0}
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        right = max(node["pos"][0] + node["size"][0] for node in self.drawn.nodes)
        return {
            "id": self.id,
            "version": 1,
            "state": state,
            "revision": 0,
            "config": {},
            "name": self.text.name,
            "description": self.text.description,
            "category": self.text.category,
            "inputNode": {"id": -10, "bounding": [-240, TOP, 180, 40 + 20 * len(self.inputs)]},
            "outputNode": {"id": -20, "bounding": [right + 60, TOP, 140, 40 + 20 * len(self.outputs)]},
            "inputs": self.ports_in,
            "outputs": self.ports_out,
            "widgets": [],
            "nodes": self.drawn.nodes,
            "groups": [],
            "links": [dict(zip(keys, link, strict=True)) for link in self.links],
            "extra": {},
        }

    def _input(self, slot: int, port: Port) -> Json:
        numbers, type_ = [], ""
        for node, name in port.places:
            target = self.drawn.input_slot(node, name)
            drawn = self.by_id[node.id]["inputs"][target]
            number, type_ = len(self.links) + 1, drawn["type"]
            self.links.append((number, -10, slot, node.id, target, type_))
            drawn["link"] = number
            numbers.append(number)
        place = [-84, TOP + 20 + 20 * slot]
        return {"id": self._uuid(f"in-{port.name}"), "name": port.name, "type": type_, "linkIds": numbers, "pos": place}

    def _output(self, slot: int, port: Port) -> Json:
        node, name = port.places[0]
        source = self.drawn.specs[node.id].output_slot(name)
        drawn = self.by_id[node.id]["outputs"][source]
        number = len(self.links) + 1
        self.links.append((number, node.id, source, -20, slot, drawn["type"]))
        drawn["links"] = [*(drawn["links"] or []), number]
        return {"id": self._uuid(f"out-{port.name}"), "name": port.name, "type": drawn["type"], "linkIds": [number]}

    def _node_input(self, drawn: Json, port: Port) -> Json:
        """The input of the blueprint's node for what `_input` drew inside."""
        node, name = port.places[0]
        inside = self.by_id[node.id]["inputs"][self.drawn.input_slot(node, name)]
        socket: Json = {"name": drawn["name"], "type": drawn["type"], "link": None}
        if self._is_widget(port):
            return {**socket, "widget": {"name": drawn["name"]}}
        return {**socket, "shape": inside["shape"]} if "shape" in inside else socket

    def _is_widget(self, port: Port) -> bool:
        node, name = port.places[0]
        return name in [widget.name for widget in self.drawn.specs[node.id].widgets]

    def _value(self, port: Port) -> Any:
        """What the widget of a port holds."""
        node, name = port.places[0]
        (widget,) = [widget for widget in self.drawn.specs[node.id].widgets if widget.name == name]
        return node.values.get(name, widget.default)

    def _uuid(self, what: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"moma/{self.text.name}/{what}"))


def dump(content: Json) -> str:
    """As the files are written."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
