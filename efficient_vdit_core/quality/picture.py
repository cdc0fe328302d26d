"""A comparison as one picture: frames of a, of b and of their amplified difference; the metrics; PSNR over time.

Drawn with Pillow at twice the size and reduced at the end, which smooths lines and letters. Lengths are pixels of the
finished picture; ``_Canvas`` doubles them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .metrics import ClipComparison, unit
from .table import clip_size, decibels, label, metrics_rows

MAX_FRAMES = 12
_SCALE = 2
_BACKGROUND, _PANEL, _GRID = (22, 24, 29), (31, 34, 41), (58, 63, 74)
_TEXT, _FAINT, _LINE = (232, 234, 238), (148, 155, 168), (98, 176, 255)
_MARGIN, _GAP, _LABELS, _PANEL_HEIGHT = 24, 6, 104, 250
_LEAST_WIDTH, _TABLE_WIDTH, _READING = 980, 440, 228  # the whole; the table's least; where its explanations begin
# From no difference to full range: dark and light are told apart in black and white too.
_HEAT = torch.tensor([[0, 0, 0], [70, 20, 110], [200, 50, 70], [250, 160, 40], [255, 255, 220]]) / 255


def comparison_picture(
    a: Tensor | Mapping[int, Tensor],
    b: Tensor | Mapping[int, Tensor],
    comparison: ClipComparison,
    *,
    names: tuple[str, str] = ("a", "b"),
    frames: int = 6,
    amplify: float = 4.0,
) -> Tensor:
    """The picture, (height, width, 3) float32 in 0..1.

    Args:
        a, b: the clips (F, H, W, 3), uint8, or float in 0..1; of a file, its ``shown_frames`` by number.
        comparison: what ``compare_clips`` found in them.
        names: what the rows are called. frames: how many are shown, evenly spread, 1 to 12.
        amplify: the mean absolute difference of the colours times this is shown, black for 0 to white for full range.
    """
    if not amplify > 0:
        raise ValueError(f"amplify is {amplify}, expected a number above 0: the difference is multiplied by it.")
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames is {frames}, expected 1 to {MAX_FRAMES}: more do not fit beside each other.")
    names = label(names[0]), label(names[1])
    shown = shown_frames(comparison.frames, frames)
    count = len(shown)
    size = _thumbnail_size(comparison, count)
    strip = _LABELS + count * (size[0] + _GAP) - _GAP
    width = max(_LEAST_WIDTH, 2 * _MARGIN + strip)
    top = _MARGIN + 3 * (size[1] + _GAP) + 40
    canvas = _Canvas(width, top + _PANEL_HEIGHT + _MARGIN)
    _draw_rows(canvas, (width - strip) / 2, size, (a, b), shown, names, amplify)
    middle = _MARGIN + max(_TABLE_WIDTH, (width - 2 * _MARGIN) * 0.4)
    _draw_table(canvas, (_MARGIN, top, middle - 8, top + _PANEL_HEIGHT), comparison, names)
    _draw_curve(canvas, (middle + 8, top, width - _MARGIN, top + _PANEL_HEIGHT), comparison.psnr_frames)
    return canvas.finish()


def shown_frames(length: int, frames: int = 6) -> list[int]:
    """Numbers of the frames in the picture of a clip of ``length`` frames."""
    count = min(frames, length)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


class _Canvas:
    """A Pillow drawing in the units of the finished picture."""

    def __init__(self, width: float, height: float) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (round(width * _SCALE), round(height * _SCALE)), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, *, size: float = 13, color: Any = _TEXT, anchor: str = "lm",
             room: float = math.inf) -> None:  # fmt: skip
        """One line; its end gives way to "..." where it is wider than ``room``."""
        from PIL import ImageFont

        font, shown, kept = ImageFont.load_default(size * _SCALE), text, len(text)
        while kept and self.draw.textlength(shown, font=font) > room * _SCALE:
            kept -= 1
            shown = text[:kept].rstrip() + "..."
        self.draw.text((x * _SCALE, y * _SCALE), shown, fill=color, font=font, anchor=anchor)

    def lines(self, points: Sequence[tuple[float, float]], *, color: Any, width: float = 1) -> None:
        self.draw.line(
            [(x * _SCALE, y * _SCALE) for x, y in points], fill=color, width=round(width * _SCALE), joint="curve"
        )

    def dot(self, x: float, y: float, radius: float, color: Any) -> None:
        self.draw.ellipse([(v + d) * _SCALE for d in (-radius, radius) for v in (x, y)], fill=color)

    def panel(self, box: tuple[float, float, float, float]) -> None:
        self.draw.rounded_rectangle([v * _SCALE for v in box], radius=8 * _SCALE, fill=_PANEL)

    def paste(self, frame: Tensor, x: float, y: float, size: tuple[int, int]) -> None:
        """frame: (H, W, 3) in 0..1. Enlarged pixel by pixel, so that nothing is smoothed away; reduced smoothly."""
        from PIL import Image

        pixels = Image.fromarray((frame.clamp(0, 1) * 255).round().byte().numpy())
        target = (size[0] * _SCALE, size[1] * _SCALE)
        way = Image.Resampling.NEAREST if target[0] >= pixels.width else Image.Resampling.LANCZOS
        self.image.paste(pixels.resize(target, way), (round(x * _SCALE), round(y * _SCALE)))

    def finish(self) -> Tensor:
        return torch.from_numpy(np.array(self.image.reduce(_SCALE))).float() / 255


def _thumbnail_size(comparison: ClipComparison, count: int) -> tuple[int, int]:
    """Width and height of a shown frame: fewer frames are shown larger, and none grows out of its row."""
    width = min(240, max(120, 1320 // count))
    height = width * comparison.height / comparison.width
    shrink = min(1.0, 260 / height)
    return max(16, round(width * shrink)), max(16, round(height * shrink))


def _draw_rows(canvas: _Canvas, left: float, size: tuple[int, int], clips: tuple[Any, Any], shown: list[int],
               names: tuple[str, str], amplify: float) -> None:  # fmt: skip
    width, height = size
    for row, name in enumerate((*names, "difference")):
        y = _MARGIN + row * (height + _GAP) + height / 2
        canvas.text(left, y - (8 if row == 2 else 0), name, size=15, room=_LABELS - 12)
        if row == 2:
            canvas.text(left, y + 10, f"x {amplify:g}", color=_FAINT)
    for column, index in enumerate(shown):
        x = left + _LABELS + column * (width + _GAP)
        first, second = (unit(clip[index]).cpu() for clip in clips)
        for row, frame in enumerate((first, second, _heat((first - second).abs().mean(-1) * amplify))):
            canvas.paste(frame, x, _MARGIN + row * (height + _GAP), size)
        number = f"frame {index}" if width >= 60 else str(index)
        canvas.text(x + width / 2, _MARGIN + 3 * (height + _GAP) + 8, number, color=_FAINT, anchor="mm", size=12)


def _draw_table(
    canvas: _Canvas, box: tuple[float, float, float, float], comparison: ClipComparison, names: tuple[str, str]
) -> None:
    canvas.panel(box)
    left, top, right, bottom = box
    canvas.text(left + 16, top + 22, f"{names[1]} against {names[0]}", size=15, room=right - left - 190)
    canvas.text(right - 16, top + 22, clip_size(comparison), color=_FAINT, anchor="rm")
    rows = metrics_rows(comparison, *names)
    step = (bottom - top - 52) / len(rows)
    for i, (name, value, reading) in enumerate(rows):
        y = top + 44 + step * (i + 0.5)
        canvas.lines([(left + 16, y - step / 2), (right - 16, y - step / 2)], color=_GRID, width=0.5)
        canvas.text(left + 16, y, name, room=128)
        canvas.text(left + 214, y, value, anchor="rm")
        canvas.text(left + _READING, y, reading, color=_FAINT, size=11, room=right - 16 - left - _READING)


def _draw_curve(canvas: _Canvas, box: tuple[float, float, float, float], values: Sequence[float]) -> None:
    """PSNR of each frame. Frames that are identical have no finite one; they are dots on the upper edge."""
    canvas.panel(box)
    left, top, right, bottom = box[0] + 46, box[1] + 46, box[2] - 18, box[3] - 34
    canvas.text(box[0] + 16, box[1] + 22, "PSNR of each frame", size=15)
    canvas.text(box[2] - 16, box[1] + 22, "dB, higher is closer", color=_FAINT, anchor="rm")
    finite = [v for v in values if math.isfinite(v)]
    ticks = _ticks(min(finite), max(finite)) if finite else [0.0, 10.0]

    def place(index: int, value: float) -> tuple[float, float]:
        share = 1.0 if math.isinf(value) else (value - ticks[0]) / (ticks[-1] - ticks[0])
        return left + (right - left) * index / max(len(values) - 1, 1), bottom - (bottom - top) * share

    for tick in ticks if finite else []:
        y = place(0, tick)[1]
        canvas.lines([(left, y), (right, y)], color=_GRID, width=0.5)
        canvas.text(left - 8, y, f"{tick:g}", color=_FAINT, anchor="rm", size=11)
    for index in sorted({round(i * (len(values) - 1) / 4) for i in range(5)}):
        canvas.text(place(index, ticks[0])[0], bottom + 14, str(index), color=_FAINT, anchor="mm", size=11)
    points = [place(i, v) for i, v in enumerate(values)]
    for i in range(len(points) - 1):
        if math.isfinite(values[i]) and math.isfinite(values[i + 1]):
            canvas.lines(points[i : i + 2], color=_LINE, width=2)
    for i, point in enumerate(points):
        alone = all(math.isinf(v) for v in (*values[max(i - 1, 0) : i], *values[i + 1 : i + 2]))  # no line leads to it
        if len(points) <= 64 or math.isinf(values[i]) or alone:
            canvas.dot(*point, 2.5, _LINE)
    if not finite:
        canvas.text((left + right) / 2, (top + bottom) / 2, decibels(math.inf), color=_FAINT, anchor="mm")


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values around low..high."""
    span = max(high - low, 0.5)
    # The last is for what rounding leaves of nothing: the square of the smallest float differs by 3,000 dB from that of 1.
    step = next(s for s in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if span / s <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 6) for i in range(first, max(last, first + 2) + 1)]


def _heat(x: Tensor) -> Tensor:
    """(H, W) in 0..1, clipped above, to colours (H, W, 3)."""
    place = x.clamp(0, 1) * (len(_HEAT) - 1)
    low = place.long().clamp(max=len(_HEAT) - 2)
    return torch.lerp(_HEAT[low], _HEAT[low + 1], (place - low)[..., None])
