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
TEMPLATE, WIDTH, HEIGHT = "minimax_h3_text_8_steps", 1920, 1600
COLUMNS, SCALE, EDGE = 3, 1.1, 12  # of the template, from the model to what the sampler is given
# Gives the box (left, top, right, bottom) of the columns in the picture, down to the end of Sparse Attention.
SHOW = """([workflow, columns, scale]) => app.loadGraphData(workflow).then(() => {
    const nodes = app.graph.nodes.filter(n => n.type !== 'MarkdownNote');
    const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
    // A note may stand above the first column; without it that one begins where the others do.
    app.graph.nodes.filter(n => n.type === 'MarkdownNote').forEach(n => app.graph.remove(n));
    const first = [...nodes, ...app.graph.groups].filter(box => box.pos[0] <= left);
    const lift = Math.min(...first.filter(box => nodes.includes(box)).map(n => n.pos[1])) - top;
    first.forEach(box => { box.pos[1] -= lift; });
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [130 / scale - left, 250 / scale - top];
    app.canvas.setDirty(true, true);
    const shown = [...app.graph.groups].sort((a, b) => a.pos[0] - b.pos[0]).slice(0, columns);
    const edges = shown.map(g => [g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]]);
    const place = (value, axis) => (value + app.canvas.ds.offset[axis]) * scale;
    const last = nodes.find(n => n.type === 'EVDiTSparseAttention');
    const below = last.pos[1] + last.size[1];
    return [0, 1, 2].map(i => place((i < 2 ? Math.min : Math.max)(...edges.map(e => e[i])), i % 2)).concat(place(below, 1));
})"""


def main(server: str, chromium: str) -> None:
    (path,) = [
        p
        for p in (ROOT / "workflows").glob("*.json")
        if json.loads(p.read_text("utf-8"))["extra"]["template"] == TEMPLATE
    ]
    with open_page(server, chromium, WIDTH, HEIGHT) as page:
        box = page.evaluate(SHOW, [json.loads(path.read_text(encoding="utf-8")), COLUMNS, SCALE])
        page.locator(".evdit-plan-chart").first.wait_for()
        page.wait_for_timeout(4000)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    corners = tuple(round(side + sign * EDGE) for side, sign in zip(box, (-1, -1, 1, 1), strict=True))
    picture.crop(corners).save(ROOT / "web" / "three_nodes.webp", quality=82)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
