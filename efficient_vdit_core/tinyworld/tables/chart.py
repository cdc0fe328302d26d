"""Draws the tiny world's table as an SVG: the share of clips that are all right, with what the attention costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from ...media.svg import INK, PALE, bar, legend, picture, words

WIDTH, ROW, TOP, LEFT, RIGHT = 860, 26, 84, 270, 190
BASE, FEW, SPARSE, TUNED, REAL = "#94a3b8", "#2563eb", "#f59e0b", "#16a34a", "#cbd5e1"
LEGEND = (("base", BASE), ("few steps", FEW), ("few steps, sparse", SPARSE), ("after knowledge distillation", TUNED))


def draw(results: dict[str, Any]) -> str:
    """The SVG's text; rows of several seeds become their mean, with a line of one deviation to each side."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["row"], []).append(row)
    machine = results["machine"]
    body = legend(LEGEND, 60)
    for number, (name, found) in enumerate(rows.items()):
        body += _bar(name, found, TOP + ROW * number)
    about = f"held-out captions, read from pixels; {machine['hardware']}, torch {machine['versions']['torch']}"
    title = "Tiny world: share of the clips that are all right"
    return picture(WIDTH, TOP + ROW * len(rows) + 30, title, about, body)


def _bar(name: str, found: Sequence[dict[str, Any]], y: int) -> list[str]:
    values = [row["all_right"] for row in found]
    scale, value = WIDTH - LEFT - RIGHT, mean(values)
    parts = [
        words(LEFT - 12, y + 15, name, anchor="end"),
        bar(LEFT, y + 4, scale * value, 15, _color(name)),
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
    return [*parts, words(LEFT + scale * value + 8, y + 16, about, size=12, fill=PALE)]


def _color(name: str) -> str:
    if name.startswith(("true", "chance")):
        return REAL
    if name.startswith("base"):
        return BASE
    return TUNED if "KD" in name else FEW if name.startswith("consistency") else SPARSE
