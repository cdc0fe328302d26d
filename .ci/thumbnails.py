#!/usr/bin/env python3
"""Takes the templates' pictures: what the tiny ones make, and of those that need downloads their plan as ComfyUI's page
draws it.

Usage: python .ci/thumbnails.py http://127.0.0.1:8188 [CHROMIUM], of a running ComfyUI with this pack.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
from comfy_page import open_page, outputs_of
from PIL import Image

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "workflows"
WIDTH, COLUMNS, ROWS, EDGE = 720, 3, 2, 2  # px, frames of a contact sheet, px
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


def run(server: str, path: Path) -> None:
    """Run one template and save its picture, or frames of its video, beside it."""
    prompt = json.loads((ROOT / "web" / "prompts" / path.name).read_text(encoding="utf-8"))
    shown = {prompt[node]["class_type"]: data for node, data in outputs_of(server, prompt)}
    video = "PreviewImage" not in shown
    data = shown["SaveVideo" if video else "PreviewImage"]
    picture = (
        contact_sheet(imageio.imread(data, extension=".mp4")) if video else Image.open(io.BytesIO(data)).convert("RGB")
    )
    resample = Image.Resampling.NEAREST if video else Image.Resampling.LANCZOS
    picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), resample).save(
        path.with_suffix(".jpg"), quality=88
    )


def contact_sheet(frames: np.ndarray) -> Image.Image:
    """Frames (F, H, W, 3), evenly spread, in reading order."""
    chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS * ROWS).round().astype(int)]
    framed = np.pad(chosen, ((0, 0), (EDGE, EDGE), (EDGE, EDGE), (0, 0)), constant_values=32)
    return Image.fromarray(
        np.concatenate([np.concatenate(list(framed[i : i + COLUMNS]), 1) for i in range(0, len(framed), COLUMNS)], 0)
    )


def main(server: str, chromium: str) -> None:
    for path in sorted(WORKFLOWS.glob("tiny*.json")):
        run(server, path)
    with open_page(server, chromium, 1000, 860) as page:
        for path in sorted(WORKFLOWS.glob("*.json")):
            if not path.stem.startswith("tiny"):
                take(page, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
