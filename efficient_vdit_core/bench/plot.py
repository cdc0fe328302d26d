"""Draws a results file of `evdit bench attention` as an SVG bar chart: measured, the paper's figure, the ideal."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from ..attention.dispatch import BACKENDS

WIDTH, ROW, TOP, LEFT, RIGHT = 860, 44, 86, 190, 70
MEASURED, PAPER, IDEAL, INK, PALE, GROUND = "#2563eb", "#f59e0b", "#94a3b8", "#0f172a", "#64748b", "#ffffff"


def draw(results: dict[str, Any], *, only_paper: bool = False) -> str:
    """The SVG's text. One row for each shape, pattern and backend of ``results``; speed-up over dense to the right.

    ``only_paper``: the rows of the paper's Table 1, the fastest of our backends for each.
    """
    rows = [row for row in results["rows"] if row["pattern"] != "full" and "speedup" in row]
    if only_paper:
        rows = _fastest([row for row in rows if row.get("paper_speedup") and row["backend"] in BACKENDS])
    if not rows:
        raise ValueError(
            "The results hold no sparse row, so there is nothing to draw. Run `evdit bench attention --json FILE` first."
        )
    most = max(max(row["ideal_speedup"], row["speedup"], row.get("paper_speedup") or 0) for row in rows)
    height = TOP + ROW * len(rows) + 40
    machine = results["machine"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{GROUND}"/>',
        _text(20, 30, "Attention under the arrow mask, speed-up over dense attention", size=17, weight=600),
        _text(20, 50, f"{machine['hardware']}, torch {machine['versions']['torch']}", fill=PALE),
        *_legend(any(row.get("paper_speedup") for row in rows)),
    ]
    scale = (WIDTH - LEFT - RIGHT) / most
    for number, row in enumerate(rows):
        parts += _bars(row, TOP + ROW * number, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each number of frames and pattern."""
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        known = best.setdefault((row["frames"], row["pattern"]), row)
        if row["speedup"] > known["speedup"]:
            best[row["frames"], row["pattern"]] = row
    return list(best.values())


def _legend(with_paper: bool) -> list[str]:
    entries = [("measured", MEASURED), ("paper (its own GPU)", PAPER), ("ideal, by FLOPs", IDEAL)]
    parts, x = [], 20
    for name, color in entries if with_paper else [entries[0], entries[2]]:
        parts += [
            f'<rect x="{x}" y="61" width="11" height="11" rx="2" fill="{color}"/>',
            _text(x + 17, 71, name, fill=PALE),
        ]
        x += 40 + 7 * len(name)
    return parts


def _bars(row: dict[str, Any], y: int, scale: float) -> list[str]:
    label = f"{row['pattern']}, {row['tokens_per_frame']} a frame"
    about = f"{row['backend']}, {row['heads']} x {row['head_dim']} {row['dtype']}"
    bars = [(row["speedup"], MEASURED, 12), (row["ideal_speedup"], IDEAL, 6)]
    if row.get("paper_speedup"):
        bars.insert(1, (row["paper_speedup"], PAPER, 6))
    parts = [
        _text(LEFT - 12, y + 17, label, anchor="end"),
        _text(LEFT - 12, y + 32, about, fill=PALE, size=10, anchor="end"),
    ]
    top = y + 8
    for value, color, thickness in bars:
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{value * scale:.1f}" height="{thickness}" rx="2" fill="{color}"/>'
        )
        top += thickness + 1
    parts.append(_text(LEFT + row["speedup"] * scale + 7, y + 18, f"{row['speedup']:.2f}x", weight=600))
    return parts


def _text(
    x: float, y: float, text: str, *, fill: str = INK, size: int = 13, weight: int = 400, anchor: str = "start"
) -> str:
    style = f'fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
