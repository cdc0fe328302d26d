#!/usr/bin/env python3
"""Draws web/icon.png and web/banner.png: an arrow mask as SVG, made a PNG by Chromium. Usage: python .ci/pictures.py
[CHROMIUM]"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

WEB = Path(__file__).parents[1] / "web"
GOLD, BLUE, NIGHT = ("#ffd166", "#f78c3b"), ("#7cc6ff", "#3a7bfd"), ("#1b2233", "#0b0e16")
FONT = "Inter, 'Liberation Sans', Arial, sans-serif"


def gradient(name: str, colors: tuple[str, str], x: float, y: float, size: float) -> str:
    """A diagonal gradient over a square at (x, y), the same for all cells in it."""
    stops = "".join(f'<stop offset="{i}" stop-color="{color}"/>' for i, color in enumerate(colors))
    where = f'gradientUnits="userSpaceOnUse" x1="{x}" y1="{y}" x2="{x + size}" y2="{y + size}"'
    return f'<linearGradient id="{name}" {where}>{stops}</linearGradient>'


def tile_map(x: float, y: float, size: float, frames: int, references: set[int]) -> str:
    """The T x T tiles of a plan: reference rows and columns gold, own frames blue, the rest dim."""
    step = size / frames
    side, cells = step * 0.86, []
    for row in range(frames):
        for column in range(frames):
            kept = row in references or column in references
            fill = "url(#gold)" if kept else "url(#blue)" if row == column else "#8fa3c8"
            opacity = 1 if kept or row == column else 0.1
            left, top = x + column * step + step * 0.07, y + row * step + step * 0.07
            at = f'x="{left:.2f}" y="{top:.2f}" width="{side:.2f}" height="{side:.2f}" rx="{step * 0.2:.2f}"'
            cells.append(f'<rect {at} fill="{fill}" fill-opacity="{opacity}"/>')
    return "".join(cells)


def page(width: int, height: int, defs: str, body: str) -> str:
    night = gradient("night", NIGHT, 0, 0, max(width, height))
    fading = "".join(
        f'<stop offset="{i}" stop-color="{BLUE[1]}" stop-opacity="{alpha}"/>' for i, alpha in enumerate((0.35, 0))
    )
    glow = f'<radialGradient id="glow">{fading}</radialGradient>'
    background = f'<rect width="{width}" height="{height}" fill="url(#night)"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return f"{head}<defs>{night}{glow}{defs}</defs>{background}{body}</svg>"


def icon() -> str:
    x, size = 52, 296
    defs = gradient("gold", GOLD, x, x, size) + gradient("blue", BLUE, x, x, size)
    return page(
        400, 400, defs, '<circle cx="240" cy="250" r="230" fill="url(#glow)"/>' + tile_map(x, x, size, 6, {0, 3})
    )


def banner() -> str:
    x, y, size = 806, 70, 400
    defs = gradient("gold", GOLD, x, y, size) + gradient("blue", BLUE, x, y, size)
    lines = [
        "Sparse 3D attention, few-step sampling",
        "and layer-wise plans for video diffusion",
        "transformers in ComfyUI",
    ]
    spans = "".join(f'<tspan x="74" dy="{38 if i else 0}">{line}</tspan>' for i, line in enumerate(lines))
    title = f'font-family="{FONT}" font-size="82" font-weight="700" letter-spacing="-2" fill="#f4f7ff"'
    text = f'<text x="70" y="236" {title}>Efficient-vDiT</text>'
    text += f'<text y="302" font-family="{FONT}" font-size="28" fill="#a9b6d3">{spans}</text>'
    for left, color, name in (
        (74, GOLD[1], "reference frames"),
        (298, BLUE[0], "own frame"),
        (458, "#33405c", "left out"),
    ):
        text += f'<rect x="{left}" y="430" width="18" height="18" rx="4" fill="{color}"/>'
        text += f'<text x="{left + 28}" y="446" font-family="{FONT}" font-size="20" fill="#8494b8">{name}</text>'
    glow = '<circle cx="1030" cy="300" r="420" fill="url(#glow)"/>'
    return page(1260, 540, defs, glow + text + tile_map(x, y, size, 12, {0, 4, 8}))


def draw(name: str, svg: str, chromium: str) -> None:
    """Write web/<name>.png at the SVG's own size."""
    width, height = (svg.split(f'{key}="')[1].split('"')[0] for key in ("width", "height"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "picture.html"
        source.write_text(
            f'<body style="margin:0">{svg.replace("<svg ", "<svg style=display:block ", 1)}</body>', encoding="utf-8"
        )
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
        subprocess.run(
            [chromium, *options, f"--screenshot={WEB / name}.png", source.as_uri()], check=True, capture_output=True
        )


if __name__ == "__main__":
    browser = sys.argv[1] if len(sys.argv) > 1 else "chromium"
    draw("icon", icon(), browser)
    draw("banner", banner(), browser)
