"""Draws the tiny world's table as an SVG: the share of clips that are all right, with what the attention costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any
from xml.sax.saxutils import escape

WIDTH, ROW, TOP, LEFT, RIGHT = 860, 26, 84, 270, 190
BASE, FEW, SPARSE, TUNED, REAL = "#94a3b8", "#2563eb", "#f59e0b", "#16a34a", "#cbd5e1"
INK, PALE, GROUND = "#0f172a", "#64748b", "#ffffff"
LEGEND = (("base", BASE), ("few steps", FEW), ("few steps, sparse", SPARSE), ("after knowledge distillation", TUNED))


def draw(results: dict[str, Any]) -> str:
    """The SVG's text; rows of several seeds become their mean, with a line of one deviation to each side."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["row"], []).append(row)
    height = TOP + ROW * len(rows) + 30
    machine = results["machine"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{GROUND}"/>',
        _text(20, 30, "Tiny world: share of the clips that are all right", size=17, weight=600),
        _text(
            20,
            50,
            f"held-out captions, read from pixels; {machine['hardware']}, torch {machine['versions']['torch']}",
            fill=PALE,
        ),
    ]
    x = 20
    for name, color in LEGEND:
        parts += [
            f'<rect x="{x}" y="60" width="11" height="11" rx="2" fill="{color}"/>',
            _text(x + 17, 70, name, fill=PALE),
        ]
        x += 40 + 7 * len(name)
    for number, (name, found) in enumerate(rows.items()):
        parts += _bar(name, found, TOP + ROW * number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(name: str, found: Sequence[dict[str, Any]], y: int) -> list[str]:
    values = [row["all_right"] for row in found]
    scale, value = WIDTH - LEFT - RIGHT, mean(values)
    parts = [
        _text(LEFT - 12, y + 15, name, anchor="end"),
        f'<rect x="{LEFT}" y="{y + 4}" width="{scale * value:.1f}" height="15" rx="2" fill="{_color(name)}"/>',
    ]
    if len(values) > 1:
        low, high = (LEFT + scale * (value + sign * stdev(values)) for sign in (-1, 1))
        parts.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 11.5}" y2="{y + 11.5}" stroke="{INK}" stroke-width="1.5"/>'
        )
    first = found[0]
    about = f"{100 * value:.1f} %"
    if first.get("sparsity"):
        about += f", attention {first['attention_ideal_speedup']:.1f}x less"
    elif "evaluations" in first:
        about += f", {first['evaluations']} evaluations"
    return [*parts, _text(LEFT + scale * value + 8, y + 16, about, size=12, fill=PALE)]


def _color(name: str) -> str:
    if name.startswith(("true", "chance")):
        return REAL
    if name.startswith("base"):
        return BASE
    return TUNED if "KD" in name else FEW if name.startswith("consistency") else SPARSE


def _text(
    x: float, y: float, text: str, *, size: int = 13, weight: int = 400, fill: str = INK, anchor: str = "start"
) -> str:
    font = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {font}>{escape(text)}</text>'
