"""A real ComfyUI page in a real browser: Debian's or Ubuntu's Chromium driven by Playwright, against a server of its
own.

$CHROMIUM names another browser; $EVDIT_SCREENSHOTS a folder that receives a picture of each step.
"""

import os
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from comfyui_server import Server, why_no_comfyui
from templates import PATHS

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 120_000  # ms; a busy machine may need it
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.ColorPalette": "dark",
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    # It opens by itself where a template's models are missing, and stays open.
    "Comfy.RightSidePanel.ShowErrorsTab": False,
    # A canvas drawn in software takes its time from everything else.
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MaximumFps": 5,
}

# What a ComfyUI with no pack and a new user folder says, and a help page that is asked for in the page's language
# first.
WITHOUT_THE_PACK = (
    r"404 .*/(api/userdata\b|user\.css$|favicon\.ico$)",
    r"uncaught TypeError: Cannot read properties of undefined \(reading 'id'\)\s+at onChange ",
    r"Attempted to cleanup event listeners for graph that was never set up @ .*/assets/GraphView",  # a subgraph is closed
    r"404 .*/docs/\w+/[\w-]+\.md$",
    r"ComfyApp graph accessed before initialization @ .*/assets/",
    r" @ .*/assets/missingModel(Download|Metadata)-",  # without API nodes the page may not ask for the sizes of missing models, and does
)


def why_no_browser() -> str:
    if not find_spec("playwright"):
        return "NO PLAYWRIGHT (pip install playwright)"
    return "" if CHROMIUM else "NO CHROMIUM (install the system's chromium, or set CHROMIUM)"


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.e2e)
    reason = why_no_comfyui() or why_no_browser()
    if here and reason:
        reason = f"{reason}: the browser tests did not run"
        warnings.warn(reason, stacklevel=1)
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


class ComfyPage:
    """One page of ComfyUI, and what its console said."""

    def __init__(self, page, server: Server):
        self.page, self.server = page, server
        self.errors: list[str] = []
        self.settings: dict = {}
        page.on(
            "console",
            lambda m: self.errors.append(f"{m.text} @ {m.location.get('url', '')}") if m.type == "error" else None,
        )
        page.on("pageerror", lambda e: self.errors.append(f"uncaught {e.stack or e.message}"))

    def open(self, **settings) -> "ComfyPage":
        """An empty workflow on a page with these settings beside the usual ones."""
        wanted = {**SETTINGS, **{key.replace("_", "."): value for key, value in settings.items()}}
        if wanted != self.settings:
            status, _ = self.server.post("/settings", wanted)
            assert status == 200
            self.settings = wanted
            self.load()
        # The page opens with what it showed last.
        self.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.page.wait_for_function("app.graph.nodes.length === 0")
        self.page.evaluate("app.canvas.ds.reset()")
        return self

    def load(self):
        """The page anew, with the workflow that it showed last."""
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self.page.wait_for_function(
            "window.app?.extensionManager && window.app.graph && !document.querySelector('#splash-loader')"
        )
        self.page.wait_for_function("!!window.LiteGraph?.registered_node_types?.EVDiTTilePlan")

    def version(self) -> tuple[int, ...]:
        """Of the page, as numbers to compare."""
        return tuple(map(int, self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__").split(".")[:2]))

    def template(self, name: str):
        """Open a template of this pack from the template browser, by clicking."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_role("dialog").get_by_text("efficient-vdit", exact=False).first.click()
        self.page.get_by_role("dialog").get_by_text(PATHS[name].stem, exact=True).first.click()
        self.page.get_by_role("dialog").wait_for(state="hidden")
        self.page.wait_for_function("app.graph.nodes.some(n => n.type.startsWith('EVDiT'))")

    def picture(self, name: str):
        folder = os.environ.get("EVDIT_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=f"{folder}/{name}.png")

    def unknown_errors(self) -> list[str]:
        """The console's errors, but for those that the same page has without this pack."""
        return [e for e in self.errors if not any(re.search(pattern, e) for pattern in WITHOUT_THE_PACK)]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def only_page(browser, server):
    """One page for all tests: loading ComfyUI's page anew takes longer than they do."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    yield ComfyPage(context.new_page(), server)
    context.close()


@pytest.fixture(scope="session")
def page_class():
    """For a test that needs a page of its own."""
    return ComfyPage


@pytest.fixture
def comfy(only_page):
    only_page.errors.clear()
    yield only_page
    assert not only_page.unknown_errors(), only_page.unknown_errors()
