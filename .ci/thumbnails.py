#!/usr/bin/env python3
"""Takes the pictures of the templates that cannot be run without downloads: their plan, as ComfyUI's page draws it.

Usage: python .ci/thumbnails.py http://127.0.0.1:8188 [CHROMIUM], of a running ComfyUI with this pack.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WORKFLOWS = Path(__file__).parents[1] / "workflows"
QUIET = {
    "Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False, "Comfy.Minimap.Visible": False,
    "Comfy.Locale": "en", "Comfy.ColorPalette": "dark", "Comfy.VueNodes.Enabled": False, "Comfy.UseNewMenu": "Top",
}  # fmt: skip
SIZE, LEFT, TOP = 620, 120, 120  # px
SHOW = """([workflow, left, top, size]) => {
    return app.loadGraphData(workflow).then(() => {
        const node = app.graph.nodes.find(n => n.type === 'EVDiTTilePlan');
        const scale = (size - 60) / node.size[0];
        app.canvas.ds.scale = scale;
        const canvas = app.canvas.canvas.getBoundingClientRect();
        app.canvas.ds.offset = [(left + 30 - canvas.left) / scale - node.pos[0], (top + 64 - canvas.top) / scale - node.pos[1]];
        app.canvas.setDirty(true, true);
    });
}"""


def take(page: Any, path: Path) -> None:
    """Load one workflow and save its plan's picture beside it."""
    page.evaluate(SHOW, [json.loads(path.read_text(encoding="utf-8")), LEFT, TOP, SIZE])
    page.locator(".evdit-plan-chart").first.wait_for()
    page.wait_for_timeout(3000)
    clip = {"x": LEFT, "y": TOP, "width": SIZE, "height": SIZE}
    page.screenshot(path=path.with_suffix(".jpg"), type="jpeg", quality=85, clip=clip)


def main(server: str, chromium: str) -> None:
    body = json.dumps(QUIET).encode()
    urllib.request.urlopen(urllib.request.Request(f"{server}/settings", body, {"Content-Type": "application/json"}), timeout=60)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 860})
        page.set_default_timeout(300_000)
        page.goto(server)
        page.wait_for_function("!!window.LiteGraph?.registered_node_types?.EVDiTTilePlan && !!window.app?.graph")
        for path in sorted(WORKFLOWS.glob("*.json")):
            if not path.stem.startswith("tiny"):
                take(page, path)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
