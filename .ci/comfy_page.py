"""A running ComfyUI with this pack, for the commands that make pictures: its prompts' results, and its page."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

QUIET = {
    "Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False, "Comfy.Minimap.Visible": False,
    "Comfy.Locale": "en", "Comfy.ColorPalette": "dark", "Comfy.VueNodes.Enabled": False, "Comfy.UseNewMenu": "Top",
}  # fmt: skip


def post(server: str, path: str, value: Any) -> Any:
    request = urllib.request.Request(
        f"{server}{path}", json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or "null")


def outputs_of(server: str, prompt: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Run a prompt and fetch every picture and video that it shows, each with its node's id."""
    number = post(server, "/prompt", {"prompt": prompt})["prompt_id"]
    while True:
        with urllib.request.urlopen(f"{server}/history/{number}", timeout=60) as answer:
            history = json.load(answer)
        if number in history:
            break
        time.sleep(1)
    if history[number]["status"]["status_str"] != "success":
        raise RuntimeError(f"the prompt failed: {history[number]['status']}")
    found = []
    for node, output in history[number]["outputs"].items():
        for file in output.get("images", []):
            with urllib.request.urlopen(f"{server}/view?{urllib.parse.urlencode(file)}", timeout=60) as answer:
                found.append((node, answer.read()))
    return found


@contextmanager
def open_page(server: str, chromium: str, width: int, height: int, modern: bool = False) -> Iterator[Page]:
    """ComfyUI's page in a browser of ``width`` x ``height`` pixels, without tours and warnings. ``modern``: Nodes 2.0."""
    post(server, "/settings", {**QUIET, "Comfy.VueNodes.Enabled": modern})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(300_000)
        page.goto(server)
        page.wait_for_function("!!window.LiteGraph?.registered_node_types?.EVDiTTilePlan && !!window.app?.graph")
        yield page
        browser.close()
