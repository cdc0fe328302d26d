"""Draws a results file of `evdit bench attention` as an SVG bar chart: measured, the paper's figure, the ideal."""

from __future__ import annotations

from typing import Any

from ..attention.backends.registry import BACKENDS
from ..media.svg import PALE, bar, legend, picture, words

WIDTH, ROW, TOP, LEFT, RIGHT = 860, 44, 86, 190, 70
MEASURED, PAPER, IDEAL = "#2563eb", "#f59e0b", "#94a3b8"
LEGEND = (("measured", MEASURED), ("paper (its own GPU)", PAPER), ("ideal, by FLOPs", IDEAL))


def draw(results: dict[str, Any], *, only_paper: bool = False) -> str:
    """The SVG's text. One row for each shape, pattern and backend of ``results``; speed-up over dense to the right.

    ``only_paper``: the rows of the paper's Table 1, the fastest of our backends for each.
    """
    rows = [row for row in results["rows"] if row["pattern"] != "full" and "speedup" in row]
    if only_paper:
        rows = _fastest([row for row in rows if row.get("paper_speedup") and row["backend"] in BACKENDS])
    if not rows:
        which, preset = ("row of the paper's Table 1", " --preset paper") if only_paper else ("sparse row", "")
        raise ValueError(
            f"The results hold no {which}, so there is nothing to draw. Run `evdit bench attention{preset} --json FILE` first."
        )
    most = max(max(row["ideal_speedup"], row["speedup"], row.get("paper_speedup") or 0) for row in rows)
    machine, scale = results["machine"], (WIDTH - LEFT - RIGHT) / most
    with_paper = any(row.get("paper_speedup") for row in rows)
    body = legend(LEGEND if with_paper else LEGEND[::2], 61)
    for number, row in enumerate(rows):
        body += _bars(row, TOP + ROW * number, scale)
    title = "Attention under the arrow mask, speed-up over dense attention"
    about = f"{machine['hardware']}, torch {machine['versions']['torch']}"
    return picture(WIDTH, TOP + ROW * len(rows) + 40, title, about, body)


def _fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each number of frames and pattern."""
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        known = best.setdefault((row["frames"], row["pattern"]), row)
        if row["speedup"] > known["speedup"]:
            best[row["frames"], row["pattern"]] = row
    return list(best.values())


def _bars(row: dict[str, Any], y: int, scale: float) -> list[str]:
    label = f"{row['pattern']}, {row['tokens_per_frame']} a frame"
    about = f"{row['backend']}, {row['heads']} x {row['head_dim']} {row['dtype']}"
    bars = [(row["speedup"], MEASURED, 12), (row["ideal_speedup"], IDEAL, 6)]
    if row.get("paper_speedup"):
        bars.insert(1, (row["paper_speedup"], PAPER, 6))
    parts = [
        words(LEFT - 12, y + 17, label, anchor="end"),
        words(LEFT - 12, y + 32, about, fill=PALE, size=10, anchor="end"),
    ]
    top = y + 8
    for value, color, thickness in bars:
        parts.append(bar(LEFT, top, value * scale, thickness, color))
        top += thickness + 1
    parts.append(words(LEFT + row["speedup"] * scale + 7, y + 18, f"{row['speedup']:.2f}x", weight=600))
    return parts
