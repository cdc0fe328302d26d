#!/usr/bin/env python3
"""Draws web/icon.png, web/banner.png and web/arrow_mask.png: arrow masks as SVG, made PNGs by Chromium. Usage, in the
project's environment: python .ci/pictures.py [CHROMIUM]"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from efficient_vdit_core.tiles import TilePattern

WEB = Path(__file__).parents[1] / "web"
GOLD, BLUE, NIGHT = ("#ffd166", "#f78c3b"), ("#7cc6ff", "#3a7bfd"), ("#1b2233", "#0b0e16")
DIM = "#8fa3c8", 0.1
FONT = "Inter, 'Liberation Sans', Arial, sans-serif"


def gradient(name: str, colors: tuple[str, str], x: float, y: float, size: float) -> str:
    """A diagonal gradient over a square at (x, y), the same for all cells in it."""
    stops = "".join(f'<stop offset="{i}" stop-color="{color}"/>' for i, color in enumerate(colors))
    where = f'gradientUnits="userSpaceOnUse" x1="{x}" y1="{y}" x2="{x + size}" y2="{y + size}"'
    return f'<linearGradient id="{name}" {where}>{stops}</linearGradient>'


def tiles(x: float, y: float, size: float, frames: int, paint: Callable[[int, int], tuple[str, float]]) -> str:
    """T x T tiles; ``paint`` tells fill and opacity by row and column."""
    step, cells = size / frames, []
    side = step * 0.86
    for row in range(frames):
        for column in range(frames):
            fill, opacity = paint(row, column)
            left, top = x + column * step + step * 0.07, y + row * step + step * 0.07
            at = f'x="{left:.2f}" y="{top:.2f}" width="{side:.2f}" height="{side:.2f}" rx="{step * 0.2:.2f}"'
            cells.append(f'<rect {at} fill="{fill}" fill-opacity="{opacity}"/>')
    return "".join(cells)


def tile_map(x: float, y: float, size: float, frames: int, references: set[int]) -> str:
    """The T x T tiles of a plan: reference rows and columns gold, own frames blue, the rest dim."""

    def paint(row: int, column: int) -> tuple[str, float]:
        if row in references or column in references:
            return "url(#gold)", 1
        return ("url(#blue)", 1) if row == column else DIM

    return tiles(x, y, size, frames, paint)


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


def mask(x: float, y: float, size: float, frames: int, pattern: TilePattern) -> str:
    """The T x T tiles of a pattern: those of the reference frames gold, of a frame and its neighbours blue, of means pale,
    the rest dim."""
    references = set() if pattern.is_full(frames) else set(pattern.reference_frames(frames))
    near, means = pattern.neighbours(frames), pattern.mean_frames(frames)

    def paint(query: int, key: int) -> tuple[str, float]:
        if query in references or key in references:
            return GOLD[1], 1
        if pattern.is_full(frames) or key in near[query]:
            return BLUE[0], 1
        return ("#b48cf2", 0.45) if any(key in mean for mean in means.get(query, ())) else DIM

    return tiles(x, y, size, frames, paint)


def arrow_mask() -> str:
    """What a layer computes of a clip of 21 latent frames, in full, under the arrow mask and under one with means."""
    frames, size, gap, top, left = 21, 330, 70, 84, 96
    masks = (
        ("Full attention", TilePattern(None), "every frame sees every frame"),
        ("Arrow mask 6:15", TilePattern(6), "itself and 6 reference frames"),
        ("2:19~1+3", TilePattern(2, window=1, means=3), "2, its neighbours, and 3 means of the rest"),
    )
    words = f'font-family="{FONT}" text-anchor="middle"'
    text = ""
    for column, (title, pattern, what) in enumerate(masks):
        x = left + column * (size + gap)
        text += mask(x, top, size, frames, pattern)
        centre, share = x + size / 2, f"{100 * pattern.density(frames):.0f} % of the tiles"
        text += f'<text x="{centre}" y="52" {words} font-size="26" font-weight="700" fill="#f4f7ff">{title}</text>'
        text += f'<text x="{centre}" y="{top + size + 34}" {words} font-size="18" fill="#a9b6d3">{what}</text>'
        text += f'<text x="{centre}" y="{top + size + 60}" {words} font-size="18" fill="#a9b6d3">{share}</text>'
    down = f'{words} font-size="16" fill="#8494b8" transform="rotate(-90 66 {top + size / 2})"'
    text += f'<text x="66" y="{top + size / 2}" {down}>a frame asks (81 frames of Wan are 21)</text>'
    return page(left + 3 * size + 2 * gap + 50, top + size + 86, "", text)


def draw(name: str, svg: str, chromium: str, colors: int = 0) -> None:
    """Write web/<name>.png at the SVG's own size, in so many ``colors`` where they are given: a fifth of the bytes."""
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
    if colors:
        with Image.open(WEB / f"{name}.png") as picture:
            few = picture.convert("RGB").quantize(colors)
        few.save(WEB / f"{name}.png", optimize=True)


if __name__ == "__main__":
    browser = sys.argv[1] if len(sys.argv) > 1 else "chromium"
    draw("icon", icon(), browser)
    draw("banner", banner(), browser)
    draw("arrow_mask", arrow_mask(), browser, colors=64)
