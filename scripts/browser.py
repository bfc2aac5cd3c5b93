"""ComfyUI's editor in a headless Chromium: what a person would click, and what they would see."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chromium import chromium_path
from playwright.sync_api import Browser, Page, sync_playwright

WINDOW = {"width": 2400, "height": 1500}
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
"""Of a user who has seen the tutorial, and wants to read everything from afar."""
CUT_OFF = (
    "net::ERR_FAILED",
    "Connecting to 'https://",
    "Fetch API cannot load https://",
    "Error fetching file size: TypeError: Failed to fetch",
)
"""How the console names requests to other hosts, which the editor makes on its own, such as for the sizes of missing
models; `Editor` or ComfyUI's Content Security Policy stops them."""
MARGIN = 30
WAIT = 300_000
"""Milliseconds, of which a slow machine may need many."""


class Editor:
    """The editor of a running server.

    Attributes:
        errors: What the page's console called an error since it was opened, but for requests to other hosts.
    """

    def __init__(self, page: Page, address: str) -> None:
        """Open the page and wait for the editor."""
        self.page, self.errors = page, []
        page.on("console", lambda message: self._note(message.text, message.location) if message.type == "error" else 0)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        # The workplace may have no network; the editor asks for news and templates' pictures of others.
        page.route("**/*", lambda route: route.continue_() if address in route.request.url else route.abort())
        page.goto(address)
        page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=WAIT)
        page.wait_for_selector("#graph-canvas", timeout=WAIT)
        page.wait_for_load_state("networkidle")
        self.close_dialogs()

    def load(self, workflow: dict[str, Any], name: str) -> None:
        """Load a workflow as opening its file would."""
        self.page.evaluate(
            "([workflow, name]) => window.app.loadGraphData(workflow, true, true, name)", [workflow, name]
        )
        self.page.wait_for_timeout(1000)

    def open_template(self, pack: str, name: str) -> None:
        """Open a template of a pack from the template browser, by clicks."""
        self.page.evaluate(
            """() => {
                for (const node of app.graph.nodes) node.momaBefore = true
                return app.extensionManager.command.execute('Comfy.BrowseTemplates')
            }"""
        )
        self.page.get_by_role("dialog").get_by_text(pack, exact=True).click()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        opened = "() => app.graph.nodes.length && !app.graph.nodes.some(node => node.momaBefore)"
        self.page.wait_for_function(opened, timeout=WAIT)
        self.page.wait_for_timeout(500)
        self.close_dialogs()

    def add_by_search(self, text: str) -> None:
        """Empty the graph and add the node that the search finds first, as a double-click on the canvas does.

        A click or key that comes before the editor is ready for it does nothing, and nothing tells in all versions
        when it is: what came to nothing is tried again, slower each time.

        Raises:
            TimeoutError: No attempt added a node.
        """
        for pause in (1000, 2000, 4000, 8000, 16_000):
            self.page.evaluate("() => window.app.graph.clear()")
            self.page.wait_for_timeout(pause / 2)
            self.page.mouse.dblclick(WINDOW["width"] // 2, WINDOW["height"] // 2)
            self.page.wait_for_timeout(pause)
            self.page.keyboard.type(text)
            self.page.wait_for_timeout(2 * pause)
            self.page.keyboard.press("Enter")
            self.page.mouse.click(WINDOW["width"] // 3, WINDOW["height"] // 3)
            self.page.wait_for_timeout(pause)
            if self.page.evaluate("() => window.app.graph.nodes.length"):
                return
            self.page.keyboard.press("Escape")
            self.close_dialogs()
        raise TimeoutError(f"the editor's search added no node for {text!r}")

    def search(self, text: str) -> list[str]:
        """What the editor's search lists for a text, in its order: ids of nodes, titles of blueprints."""
        script = """text => {
            const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s
            const found = stores.get('nodeDef').nodeSearchService.searchNode(text, [], {limit: 64})
            return found.map(node => node.name.startsWith('SubgraphBlueprint.') ? node.display_name : node.name)
        }"""
        return list(self.page.evaluate(script, text))

    def close_dialogs(self) -> None:
        """Close whatever lies over the graph."""
        for _ in range(3):
            if not self.page.locator(".p-dialog:visible, [role=dialog]:visible").count():
                return
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(300)

    def unknown_nodes(self) -> list[str]:
        """Types of nodes in the graph that the editor does not know."""
        script = """() => {
            const known = window.LiteGraph.registered_node_types
            return window.app.graph.nodes.filter(n => !(n.type in known)).map(n => n.type)
        }"""
        return list(self.page.evaluate(script))

    def saved(self) -> dict[str, Any]:
        """The graph as the editor saves it."""
        return dict(json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())")))

    def widgets(self, kind: str) -> dict[str, Any]:
        """Names and values of the widgets of the first node of a type."""
        script = """kind => app.graph.nodes.find(node => node.type === kind).widgets.map(w => [w.name, w.value])"""
        return dict(self.page.evaluate(script, kind))

    def prompt(self) -> dict[str, Any]:
        """What the editor would queue for the graph."""
        return dict(self.page.evaluate("async () => (await window.app.graphToPrompt()).output"))

    def has_app_view(self) -> bool:
        """Whether this editor has an app view with the inputs and outputs that a workflow names."""
        script = "() => app.extensionManager.command.commands.some(c => c.id === 'Workspace.ToggleSidebarTab.apps')"
        return bool(self.page.evaluate(script))

    @contextmanager
    def app_view(self) -> Iterator[list[str]]:
        """The app view of the graph, with the names of what it asks for."""
        toggle = "() => app.extensionManager.command.execute('Comfy.ToggleLinear')"
        self.page.evaluate(toggle)
        try:
            self.page.get_by_test_id("linear-widgets").wait_for(timeout=WAIT)
            yield self.page.get_by_test_id("builder-widget-label").all_inner_texts()
        finally:
            self.page.evaluate(toggle)

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of nodes that lie over one another, by title."""
        script = """() => {
            const boxes = window.app.graph.nodes.map(n => [n.title, n.getBounding()])
            const found = []
            boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                const across = p[0] < q[0] + q[2] && q[0] < p[0] + p[2]
                if (across && p[1] < q[1] + q[3] && q[1] < p[1] + p[3]) found.push([a, b])
            }))
            return found
        }"""
        return [(a, b) for a, b in self.page.evaluate(script)]

    def queue(self, timeout: float) -> None:
        """Queue the graph and wait for its end."""
        self.page.evaluate(
            """() => {
                window.momaEnded = null
                for (const kind of ['execution_success', 'execution_error'])
                    window.app.api.addEventListener(kind, event => { window.momaEnded = [kind, event.detail] })
                return window.app.queuePrompt(0)
            }"""
        )
        self.page.wait_for_function("() => window.momaEnded", timeout=timeout)
        kind, detail = self.page.evaluate("() => window.momaEnded")
        if kind == "execution_error":
            raise RuntimeError(f"{detail['node_type']}: {detail['exception_message']}")
        self.page.wait_for_timeout(1500)

    def paint_mask(self, kind: str, lines: Sequence[Sequence[tuple[float, float]]]) -> None:
        """Paint into the mask of the first node of a type that shows a picture, in the mask editor, and save.

        Args:
            lines: What the brush draws, corner by corner; 0..1 across and down the picture.
        """
        self.page.evaluate(
            """kind => {
                app.canvas.selectNode(app.graph.nodes.find(node => node.type === kind))
                return app.extensionManager.command.execute('Comfy.MaskEditor.OpenMaskEditor')
            }""",
            kind,
        )
        dialog = self.page.get_by_role("dialog")
        canvas = dialog.locator("canvas.z-30").first
        canvas.wait_for(timeout=WAIT)
        drawn = """() => {
            const picture = document.querySelector('[role=dialog] canvas.z-0')
            const middle = [picture?.width >> 1, picture?.height >> 1, 1, 1]
            return picture?.width && picture.getContext('2d').getImageData(...middle).data[3]
        }"""
        self.page.wait_for_function(drawn, timeout=WAIT)
        box, before = canvas.bounding_box(), None
        while box is None or box != before:  # the picture is put into its place
            self.page.wait_for_timeout(500)
            box, before = canvas.bounding_box(), box
        for line in lines:
            corners = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
            self.page.mouse.move(*corners[0])
            self.page.mouse.down()
            for corner in corners[1:]:
                self.page.mouse.move(*corner, steps=8)
            self.page.mouse.up()
        dialog.get_by_role("button", name="Save").click()
        saved = "kind => app.graph.nodes.find(n => n.type === kind).widgets[0].value.includes('clipspace')"
        self.page.wait_for_function(saved, arg=kind, timeout=WAIT)
        canvas.wait_for(state="detached", timeout=WAIT)

    def show(self, kinds: Sequence[str] = ()) -> dict[str, float]:
        """Scale and move the canvas until the nodes of these types (or all) are in sight; where they then are."""
        script = """([kinds, margin]) => {
            const canvas = window.app.canvas, nodes = window.app.graph.nodes
            const boxes = nodes.filter(n => !kinds.length || kinds.includes(n.type)).map(n => n.getBounding())
            if (!kinds.length) boxes.push(...window.app.graph.groups.map(g => g._bounding ?? g.boundingRect))
            const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]))
            const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]))
            const area = document.querySelector('#graph-canvas').getBoundingClientRect()
            const free = [80, 120, area.width - 40, area.height - 60]
            const scale = Math.min(
                1.4,
                (free[2] - free[0] - 2 * margin) / (right - left),
                (free[3] - free[1] - 2 * margin) / (bottom - top)
            )
            canvas.ds.scale = scale
            canvas.ds.offset = [(free[0] + margin) / scale - left, (free[1] + margin) / scale - top]
            canvas.deselectAll?.()
            canvas.setDirty(true, true)
            canvas.draw(true, true)
            return {x: free[0], y: free[1], width: (right - left) * scale + 2 * margin,
                    height: (bottom - top) * scale + 2 * margin}
        }"""
        clip = dict(self.page.evaluate(script, [list(kinds), MARGIN]))
        self.page.wait_for_timeout(700)
        return clip

    def open_help(self, kind: str) -> None:
        """Open the help page of the first node of a type, as its toolbox button does."""
        self.show((kind,))
        self.page.evaluate(
            "kind => app.canvas.selectNode(app.graph.nodes.find(node => node.type === kind))",
            kind,
        )
        self.page.wait_for_timeout(800)
        self.page.get_by_test_id("info-button").click()

    def picture(self, path: Path, kinds: Sequence[str] = ()) -> None:
        """A picture of the nodes of these types, or of all."""
        clip = self.show(kinds)
        self.page.screenshot(path=path, clip=clip, animations="disabled")

    def _note(self, text: str, location: dict[str, Any]) -> None:
        if not any(sign in text for sign in CUT_OFF):
            self.errors.append(f"{text} ({location.get('url', '')})")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium; one at a time.

    Raises:
        FileNotFoundError: There is none.
    """
    path = chromium_path()
    if path is None:
        raise FileNotFoundError("No Chromium: install it (on Debian `apt-get install chromium`) or set CHROMIUM.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_editor(browser: Browser, address: str) -> Iterator[Editor]:
    """The editor of the server at `address`, in a window of a new user."""
    context = browser.new_context(viewport=WINDOW)
    try:
        yield Editor(context.new_page(), address)
    finally:
        context.close()
