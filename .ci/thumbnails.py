#!/usr/bin/env python3
"""Makes the templates' pictures: model, size and gain in words, over what the tiny ones make and the plans of the others.

Usage: python .ci/thumbnails.py http://127.0.0.1:8188 [CHROMIUM], of a running ComfyUI with this pack; after templates.py.
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
from downloaded_graphs import downloaded_graphs
from graph import Graph
from PIL import Image, ImageDraw, ImageFont
from tiny_graphs import tiny_graphs

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "workflows"
SIDE, COLUMNS, ROWS, EDGE = 720, 3, 2, 2  # px, frames of a contact sheet, px
BADGE, LINES, BOTTOM = 84, (54, 34, 34), 40  # px: the page's badge covers so much of the top; letters; free below
BACKGROUND, COLORS = (24, 26, 30), ((255, 255, 255), (190, 198, 208), (255, 176, 92))
SHOW = """workflow => app.loadGraphData(workflow).then(() => {
    const node = app.graph.nodes.find(n => ['EVDiTTilePlan', 'EVDiTLoadTilePlan'].includes(n.type));
    app.canvas.ds.scale = 1.8;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    app.canvas.ds.offset = [(120 - canvas.left) / 1.8 - node.pos[0], (120 - canvas.top) / 1.8 - node.pos[1]];
    app.canvas.setDirty(true, true);
})"""


def plan_picture(page: Any, workflow: Path) -> Image.Image:
    """The chart of a template's plan, as the page draws it."""
    page.evaluate(SHOW, json.loads(workflow.read_text(encoding="utf-8")))
    chart = page.locator(".evdit-plan-chart").first
    chart.wait_for()
    page.wait_for_timeout(2000)
    return Image.open(io.BytesIO(chart.screenshot())).convert("RGB")


def result_picture(server: str, graph: Graph) -> Image.Image:
    """What a tiny template's run shows, or frames of its video."""
    prompt = json.loads((ROOT / "web" / "prompts" / f"{graph.name}.json").read_text(encoding="utf-8"))
    shown = {prompt[node]["class_type"]: data for node, data in outputs_of(server, prompt)}
    if "PreviewImage" in shown:
        return Image.open(io.BytesIO(shown["PreviewImage"])).convert("RGB")
    sheet = contact_sheet(imageio.imread(shown["SaveVideo"], extension=".mp4"))
    return sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST)


def contact_sheet(frames: np.ndarray) -> Image.Image:
    """Frames (F, H, W, 3), evenly spread, in reading order."""
    chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS * ROWS).round().astype(int)]
    framed = np.pad(chosen, ((0, 0), (EDGE, EDGE), (EDGE, EDGE), (0, 0)), constant_values=32)
    return Image.fromarray(
        np.concatenate([np.concatenate(list(framed[i : i + COLUMNS]), 1) for i in range(0, len(framed), COLUMNS)], 0)
    )


def compose(caption: tuple[str, ...], picture: Image.Image) -> Image.Image:
    """Words under the page's badge, the picture below them; square, as the page cuts it."""
    card, top = Image.new("RGB", (SIDE, SIDE), BACKGROUND), BADGE
    draw = ImageDraw.Draw(card)
    for line, size, color in zip(caption, LINES, COLORS, strict=True):
        draw.text((36, top), line, font=ImageFont.load_default(size), fill=color)
        top += size + 12
    room = SIDE - 2 * 36, SIDE - top - BOTTOM - 16
    share = min(room[0] / picture.width, room[1] / picture.height)
    picture = picture.resize((round(picture.width * share), round(picture.height * share)), Image.Resampling.LANCZOS)
    card.paste(picture, ((SIDE - picture.width) // 2, top + 16 + (room[1] - picture.height) // 2))
    return card


def main(server: str, chromium: str) -> None:
    paths = {json.loads(p.read_text(encoding="utf-8"))["extra"]["template"]: p for p in WORKFLOWS.glob("*.json")}
    for path in WORKFLOWS.glob("*.jpg"):
        path.unlink()
    pictures = [(graph, result_picture(server, graph)) for graph in tiny_graphs()]
    with open_page(server, chromium, 1280, 1000) as page:
        pictures += [(graph, plan_picture(page, paths[graph.name])) for graph in downloaded_graphs()]
    for graph, picture in pictures:
        compose(graph.caption, picture).save(paths[graph.name].with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
