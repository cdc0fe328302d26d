"""Heat maps of the tile mass, as a picture: a title with the legend, and a panel for each layer or group of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..limits.quote import shortened

SMALLEST, LARGEST, TILE = 360, 720, 6  # pixels: the side of a heat map, as long as its tiles want
LEFT, RIGHT, TOP, BOTTOM, LINE, MARGIN, HEADER = 78, 74, 54, 58, 24, 22, 92
MOST_COLUMNS, NARROWEST = 4, 640
TITLE = 36  # characters of a panel's title, at most
HATCH = 9  # pixels from line to line
INK, FAINT, PAPER, EDGE = (28, 32, 40), (110, 117, 128), (255, 255, 255), (226, 110, 38)
# Light to dark, evenly falling lightness, readable in grey and by the colour-blind.
COLORS = np.array(
    [(247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107), (3, 19, 43)], dtype=np.float64
)

Marks = Callable[[np.ndarray], np.ndarray]  # where (H, W) bool -> the pixels of it that are marked


@dataclass
class Panel:
    """One layer, or heads of it: ``share`` (T, T) of attention mass, rows are queries; a plan's ``kept`` tiles (T, T) bool, and of
    the others those that it sees in a mean, ``averaged``; ``notes`` below it."""

    title: str
    share: Tensor
    kept: Tensor | None = None
    averaged: Tensor | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def draw_panels(panels: Sequence[Panel], title: str, subtitle: str) -> np.ndarray:
    """The picture (H, W, 3) float32 in 0..1. Colours are the square root of the share, on one scale for all panels."""
    top = max(float(p.share.max()) for p in panels) or 1.0
    columns, side = _columns(len(panels)), _side(max(len(p.share) for p in panels))
    panel_width = LEFT + side + RIGHT
    notes = [_wrapped(panel.notes, side + RIGHT - 10) for panel in panels]
    height = TOP + side + BOTTOM + max(map(len, notes)) * LINE + MARGIN
    width = max(columns * panel_width, NARROWEST)
    image = Image.new("RGB", (width, HEADER + -(-len(panels) // columns) * height), PAPER)
    draw = ImageDraw.Draw(image)
    _header(draw, image, title, subtitle, _legend(panels))
    for i, panel in enumerate(panels):
        left, upper = (i % columns) * panel_width + LEFT, HEADER + i // columns * height + TOP
        _draw_panel(draw, image, panel, left, upper, side, top)
        for line, note in enumerate(notes[i]):
            draw.text((left, upper + side + BOTTOM + line * LINE), note, font=_font(16), fill=INK)
    return np.asarray(image, dtype=np.float32) / 255.0


def _side(frames: int) -> int:
    """Pixels of a heat map: in smaller tiles a long clip's marks would hide the colours between them."""
    return min(max(SMALLEST, TILE * frames), LARGEST)


def _wrapped(notes: Sequence[str], width: int) -> list[str]:
    """The notes in lines of at most ``width`` pixels; what goes on is set in."""
    lines: list[str] = []
    for note in notes:
        first, *words = note.split(" ")
        lines.append(first)
        for word in words:
            longer = f"{lines[-1]} {word}"
            if _font(16).getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(f"    {word}")
    return lines


def _columns(count: int) -> int:
    """As many as fit, and as few as leave the fewest places empty."""
    rows = -(-count // MOST_COLUMNS)
    return -(-count // rows)


def _legend(panels: Sequence[Panel]) -> dict[str, Marks]:
    """What the marks mean that stand in any panel."""
    marked = [_marked(p.kept, p.averaged) for p in panels if p.kept is not None]
    names = {_hatching: "left out by the plan", _dots: "seen in a mean"}
    return {name: marks for marks, name in names.items() if any(bool(tiles[marks].any()) for tiles in marked)}


def _marked(kept: Tensor, averaged: Tensor | None) -> dict[Marks, np.ndarray]:
    """The tiles (T, T) bool under each kind of marks."""
    means = np.zeros(kept.shape, dtype=bool) if averaged is None else averaged.numpy()
    return {_hatching: ~kept.numpy() & ~means, _dots: means}


def _header(draw: ImageDraw.ImageDraw, image: Image.Image, title: str, subtitle: str, legend: dict[str, Marks]) -> None:
    draw.text((MARGIN, 14), title, font=_font(25), fill=INK)
    draw.text((MARGIN, 50), subtitle, font=_font(16), fill=FAINT)
    size = 18
    for line, (text, marks) in enumerate(legend.items()):
        right, upper = image.width - MARGIN, 20 + 26 * line
        left = right - int(draw.textlength(text, font=_font(16))) - size - 8
        swatch = np.full((size, size, 3), COLORS[1], dtype=np.uint8)
        swatch[marks(np.ones((size, size), dtype=bool))] = EDGE
        image.paste(Image.fromarray(swatch), (left, upper))
        draw.rectangle((left - 1, upper - 1, left + size, upper + size), outline=EDGE)
        draw.text((right, upper + 9), text, font=_font(16), fill=INK, anchor="rm")


def _draw_panel(
    draw: ImageDraw.ImageDraw, image: Image.Image, panel: Panel, left: int, upper: int, side: int, top: float
) -> None:
    """The panel whose heat map has its corner at (left, upper), and ``side`` pixels."""
    draw.text((left, upper - 12), shortened(panel.title, TITLE), font=_font(21), fill=INK, anchor="ls")
    image.paste(_heat_map(panel, side, top), (left, upper))
    if panel.kept is not None:
        _outline(draw, panel.kept, left, upper, side)
    draw.rectangle((left - 1, upper - 1, left + side, upper + side), outline=FAINT)
    _axes(draw, image, len(panel.share), left, upper, side)
    _color_bar(draw, image, left + side + 16, upper, side, top)


def _heat_map(panel: Panel, side: int, top: float) -> Image.Image:
    at = np.arange(side) * len(panel.share) // side
    pixels = _colors(np.sqrt(panel.share.double().numpy() / top))[at][:, at]
    if panel.kept is not None:
        for marks, tiles in _marked(panel.kept, panel.averaged).items():
            pixels[marks(tiles[at][:, at])] = EDGE
    return Image.fromarray(pixels)


def _hatching(where: np.ndarray) -> np.ndarray:
    """The pixels of slanted lines within ``where`` (H, W) bool."""
    rows, columns = np.indices(where.shape)
    return where & ((rows + columns) % HATCH == 0)


def _dots(where: np.ndarray) -> np.ndarray:
    """The pixels of small dots within ``where`` (H, W) bool."""
    rows, columns = np.indices(where.shape)
    return where & (rows % HATCH < 2) & (columns % HATCH < 2)


def _outline(draw: ImageDraw.ImageDraw, kept: Tensor, left: int, upper: int, side: int) -> None:
    """A line wherever a kept tile meets one that is left out."""
    tiles, frames = kept.numpy(), len(kept)
    at = [-(-i * side // frames) for i in range(frames + 1)]
    for i, j in np.argwhere(tiles[:-1] != tiles[1:]):
        draw.line((left + at[j], upper + at[i + 1], left + at[j + 1], upper + at[i + 1]), fill=EDGE)
    for i, j in np.argwhere(tiles[:, :-1] != tiles[:, 1:]):
        draw.line((left + at[j + 1], upper + at[i], left + at[j + 1], upper + at[i + 1]), fill=EDGE)


def _axes(draw: ImageDraw.ImageDraw, image: Image.Image, frames: int, left: int, upper: int, side: int) -> None:
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, frames) if frames / s <= 12)
    for frame in range(0, frames, step):
        middle = int((frame + 0.5) * side / frames)
        draw.text((left + middle, upper + side + 6), str(frame), font=_font(15), fill=FAINT, anchor="ma")
        draw.text((left - 7, upper + middle), str(frame), font=_font(15), fill=FAINT, anchor="rm")
    draw.text((left + side // 2, upper + side + 26), "key: latent frame", font=_font(15), fill=INK, anchor="ma")
    words = Image.new("RGB", (150, 22), PAPER)
    ImageDraw.Draw(words).text((75, 11), "query: latent frame", font=_font(15), fill=INK, anchor="mm")
    image.paste(words.rotate(90, expand=True), (left - 62, upper + side // 2 - 75))


def _color_bar(draw: ImageDraw.ImageDraw, image: Image.Image, left: int, upper: int, side: int, top: float) -> None:
    bar = _colors(np.linspace(1.0, 0.0, side))[:, None].repeat(14, axis=1)
    image.paste(Image.fromarray(bar), (left, upper))
    draw.rectangle((left - 1, upper - 1, left + 14, upper + side), outline=FAINT)
    for value in _round_shares(top):
        y = upper + (1.0 - math.sqrt(value / top)) * (side - 1)
        draw.line((left + 14, y, left + 17, y), fill=FAINT)
        draw.text((left + 20, y), f"{100 * value:g} %", font=_font(13), fill=FAINT, anchor="lm")


def _round_shares(top: float) -> list[float]:
    """Round numbers up to ``top``, far enough apart on the square-root scale."""
    decade = 10.0 ** math.floor(math.log10(top))
    candidates = [digit * decade / scale for scale in (1, 10, 100) for digit in (8, 6, 4, 2, 1)]
    found: list[float] = []
    for value in (c for c in candidates if c <= top):
        if not found or math.sqrt(found[-1] / top) - math.sqrt(value / top) > 0.07:
            found.append(value)
    return [*(v for v in found if math.sqrt(v / top) > 0.07), 0.0]


def _colors(values: np.ndarray) -> np.ndarray:
    """0..1 of any shape to uint8 colours (..., 3)."""
    at = np.clip(values, 0.0, 1.0) * (len(COLORS) - 1)
    mixed = np.stack([np.interp(at, np.arange(len(COLORS)), COLORS[:, c]) for c in range(3)], axis=-1)
    return mixed.round().astype(np.uint8)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
