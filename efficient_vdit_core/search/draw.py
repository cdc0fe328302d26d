"""Heat maps of the tile mass, as a picture: a panel for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANEL_WIDTH, MAP = 512, 360  # pixels: a panel, and the heat map in it
LEFT, TOP, LINE, MARGIN = 74, 62, 22, 16
MOST_COLUMNS = 3
INK, FAINT, PAPER, EDGE = (28, 32, 40), (110, 117, 128), (255, 255, 255), (214, 69, 65)
# Light to dark, evenly falling lightness, readable in grey and by the colour-blind.
COLORS = np.array([(247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107), (3, 19, 43)], dtype=np.float64)


@dataclass
class Panel:
    """One layer: ``share`` (T, T) of attention mass, rows are queries; ``kept`` (T, T) bool outlines a plan's tiles."""

    title: str
    share: Tensor
    kept: Tensor | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def draw_panels(panels: Sequence[Panel]) -> np.ndarray:
    """The picture (H, W, 3) float32 in 0..1. Colours are the square root of the share, on one scale for all panels."""
    top = max(float(p.share.max()) for p in panels) or 1.0
    columns = min(len(panels), MOST_COLUMNS)
    lines = max(len(p.notes) for p in panels)
    height = TOP + MAP + 52 + lines * LINE + MARGIN
    image = Image.new("RGB", (columns * PANEL_WIDTH, -(-len(panels) // columns) * height), PAPER)
    for i, panel in enumerate(panels):
        _draw_panel(ImageDraw.Draw(image), image, panel, (i % columns) * PANEL_WIDTH, i // columns * height, top)
    return np.asarray(image, dtype=np.float32) / 255.0


def _draw_panel(draw: ImageDraw.ImageDraw, image: Image.Image, panel: Panel, x: int, y: int, top: float) -> None:
    draw.text((x + LEFT, y + MARGIN), panel.title, font=_font(22), fill=INK)
    left, upper = x + LEFT, y + TOP
    image.paste(_heat_map(panel.share, top), (left, upper))
    if panel.kept is not None:
        _outline(draw, panel.kept, left, upper)
    draw.rectangle((left - 1, upper - 1, left + MAP, upper + MAP), outline=FAINT)
    _axes(draw, image, len(panel.share), left, upper)
    _color_bar(draw, image, left + MAP + 16, upper, top)
    for line, note in enumerate(panel.notes):
        draw.text((x + MARGIN, upper + MAP + 50 + line * LINE), note, font=_font(16), fill=INK)


def _heat_map(share: Tensor, top: float) -> Image.Image:
    frames = len(share)
    edges = np.arange(MAP) * frames // MAP
    cells = _colors(np.sqrt(share.double().numpy() / top))
    return Image.fromarray(cells[edges][:, edges])


def _outline(draw: ImageDraw.ImageDraw, kept: Tensor, left: int, upper: int) -> None:
    """A line wherever a kept tile meets a skipped one."""
    frames = len(kept)
    at = [-(-i * MAP // frames) for i in range(frames + 1)]
    for i in range(frames):
        for j in range(frames):
            if i + 1 < frames and bool(kept[i, j] != kept[i + 1, j]):
                draw.line((left + at[j], upper + at[i + 1], left + at[j + 1], upper + at[i + 1]), fill=EDGE, width=2)
            if j + 1 < frames and bool(kept[i, j] != kept[i, j + 1]):
                draw.line((left + at[j + 1], upper + at[i], left + at[j + 1], upper + at[i + 1]), fill=EDGE, width=2)


def _axes(draw: ImageDraw.ImageDraw, image: Image.Image, frames: int, left: int, upper: int) -> None:
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, frames) if frames / s <= 12)
    for frame in range(0, frames, step):
        middle = int((frame + 0.5) * MAP / frames)
        draw.text((left + middle, upper + MAP + 5), str(frame), font=_font(15), fill=FAINT, anchor="ma")
        draw.text((left - 6, upper + middle), str(frame), font=_font(15), fill=FAINT, anchor="rm")
    draw.text((left + MAP // 2, upper + MAP + 23), "key frame", font=_font(15), fill=INK, anchor="ma")
    words = Image.new("RGB", (120, 22), PAPER)
    ImageDraw.Draw(words).text((60, 11), "query frame", font=_font(15), fill=INK, anchor="mm")
    image.paste(words.rotate(90, expand=True), (left - 58, upper + MAP // 2 - 60))


def _color_bar(draw: ImageDraw.ImageDraw, image: Image.Image, left: int, upper: int, top: float) -> None:
    bar = _colors(np.linspace(1.0, 0.0, MAP))[:, None].repeat(14, axis=1)
    image.paste(Image.fromarray(bar), (left, upper))
    draw.rectangle((left - 1, upper - 1, left + 14, upper + MAP), outline=FAINT)
    for part in (0.0, 0.1, 0.25, 0.5, 1.0):
        y = upper + (1.0 - math.sqrt(part)) * (MAP - 1)
        draw.text((left + 19, y), f"{100 * top * part:.3g}", font=_font(13), fill=FAINT, anchor="lm")
    draw.text((left + 7, upper - 18), "%", font=_font(13), fill=FAINT, anchor="ma")


def _colors(values: np.ndarray) -> np.ndarray:
    """0..1 of any shape to uint8 colours (..., 3)."""
    at = np.clip(values, 0.0, 1.0) * (len(COLORS) - 1)
    mixed = np.stack([np.interp(at, np.arange(len(COLORS)), COLORS[:, c]) for c in range(3)], axis=-1)
    return mixed.round().astype(np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
