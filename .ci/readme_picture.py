#!/usr/bin/env python3
"""Makes web/three_nodes.webp, README's first picture: a template as ComfyUI's page opens it.

Usage: python .ci/readme_picture.py http://127.0.0.1:8188 [CHROMIUM], of a running ComfyUI with this pack, and with files of the
template's names, which may be empty: those that it lacks are framed in red.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from comfy_page import open_page
from PIL import Image

ROOT = Path(__file__).parents[1]
TEMPLATE, WIDTH, HEIGHT = "minimax_h3_text_8_steps", 1920, 1080
SHOW = """workflow => app.loadGraphData(workflow).then(() => {
    const nodes = app.graph.nodes.filter(n => n.type !== 'MarkdownNote');
    const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
    // A note may stand above the first column; without it that one begins where the others do.
    app.graph.nodes.filter(n => n.type === 'MarkdownNote').forEach(n => app.graph.remove(n));
    const first = [...nodes, ...app.graph.groups].filter(box => box.pos[0] <= left);
    const lift = Math.min(...first.filter(box => nodes.includes(box)).map(n => n.pos[1])) - top;
    first.forEach(box => { box.pos[1] -= lift; });
    app.canvas.ds.scale = 0.9;
    app.canvas.ds.offset = [90 / 0.9 - left, 130 / 0.9 - top];
    app.canvas.setDirty(true, true);
})"""


def main(server: str, chromium: str) -> None:
    (path,) = [
        p
        for p in (ROOT / "workflows").glob("*.json")
        if json.loads(p.read_text("utf-8"))["extra"]["template"] == TEMPLATE
    ]
    with open_page(server, chromium, WIDTH, HEIGHT) as page:
        page.evaluate(SHOW, json.loads(path.read_text(encoding="utf-8")))
        page.locator(".evdit-plan-chart").first.wait_for()
        page.wait_for_timeout(4000)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.crop((64, 90, WIDTH, 1000)).resize((1280, round(910 * 1280 / (WIDTH - 64)))).save(
        ROOT / "web" / "three_nodes.webp", quality=82
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
