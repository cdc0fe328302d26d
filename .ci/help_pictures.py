#!/usr/bin/env python3
"""Makes the pictures of the help pages, web/docs/<Node>/*.webp: what the tiny templates' runs show, and the nodes in
ComfyUI's page.

Usage: python .ci/help_pictures.py http://127.0.0.1:8188 [CHROMIUM], of a running ComfyUI with this pack.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

from comfy_page import open_page, outputs_of
from PIL import Image
from thumbnails import ROOT

DOCS, WIDTH, EDGE = ROOT / "web" / "docs", 760, 14  # px: widest picture, around a node
# Node of the page -> template whose Preview Image is shown.
RESULTS = {
    "EVDiTAttentionTileMap": "tiny_attention_tile_map",
    "EVDiTCompareVideos": "tiny_dense_beside_sparse",
    "EVDiTSearchTilePlan": "tiny_search_a_plan",
}
# Node of the page -> template whose page is shown.
NODES = {
    "EVDiTModelLoader": "tiny_text_to_video",
    "EVDiTTextEncoderLoader": "opensora_plan_29x720p",
    "EVDiTVAELoader": "tiny_text_to_video",
    "EVDiTTilePlan": "opensora_plan_29x720p",
    "EVDiTConsistencySigmas": "tiny_text_to_video",
    "EVDiTConsistencySampler": "tiny_text_to_video",
    "EVDiTSaveTilePlan": "tiny_search_a_plan",
    "EVDiTLoadTilePlan": "",
    "EVDiTReport": "tiny_dense_beside_sparse",
    "EVDiTSequenceParallel": "opensora_plan_several_gpus",
}
RUN_FIRST = {"EVDiTSaveTilePlan", "EVDiTReport"}  # they show what a run says
RUN = """async () => {
    const ended = new Promise((resolve, reject) => {
        app.api.addEventListener("execution_success", resolve, { once: true });
        app.api.addEventListener("execution_error", ({ detail }) => reject(detail.exception_message), { once: true });
    });
    await app.queuePrompt(0, 1);
    await ended;
}"""
SHOW = """async ([kind, workflow]) => {
    if (workflow) await app.loadGraphData(workflow);
    else { app.graph.clear(); app.graph.add(LiteGraph.createNode(kind)); }
    const node = app.graph.nodes.find(n => n.type === kind), ds = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    ds.scale = 1.2;
    ds.offset = [(420 - canvas.left) / ds.scale - node.pos[0], (260 - canvas.top) / ds.scale - node.pos[1]];
    app.canvas.deselectAll();
    app.canvas.setDirty(true, true);
}"""
# Once the node has grown to what it holds.
PLACE = """kind => {
    const node = app.graph.nodes.find(n => n.type === kind), scale = app.canvas.ds.scale;
    return [420, 260 - 30 * scale, node.size[0] * scale, (node.size[1] + 30) * scale];
}"""


def save(picture: Image.Image, node: str, name: str) -> None:
    """web/docs/<node>/<name>.webp, no wider than the help panel needs."""
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
    (DOCS / node).mkdir(exist_ok=True)
    picture.convert("RGB").save(DOCS / node / f"{name}.webp", quality=82, method=6)


def results(server: str) -> None:
    """Pictures that the tiny templates show in their Preview Image."""
    for node, template in RESULTS.items():
        prompt = json.loads((ROOT / "web" / "prompts" / f"{template}.json").read_text(encoding="utf-8"))
        shown = {key: data for key, data in outputs_of(server, prompt) if prompt[key]["class_type"] == "PreviewImage"}
        save(Image.open(io.BytesIO(next(iter(shown.values())))), node, "result")


def nodes(page: Any) -> None:
    """Each node as the page draws it, with its values in a template."""
    workflows = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "workflows").glob("*.json")]
    named = {workflow["extra"]["template"]: workflow for workflow in workflows}
    for kind, template in NODES.items():
        workflow = named[template] if template else None
        page.evaluate(SHOW, [kind, workflow])
        if kind in RUN_FIRST:
            page.evaluate(RUN)
        page.wait_for_timeout(2500)
        x, y, width, height = page.evaluate(PLACE, kind)
        clip = {"x": x - EDGE, "y": y - EDGE, "width": width + 2 * EDGE, "height": height + 2 * EDGE}
        save(Image.open(io.BytesIO(page.screenshot(clip=clip))), kind, "node")


def main(server: str, chromium: str) -> None:
    results(server)
    with open_page(server, chromium, 1280, 1100) as page:
        nodes(page)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
