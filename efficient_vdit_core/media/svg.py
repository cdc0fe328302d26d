"""The parts of SVG that the charts here are drawn of. Sizes are in px."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

INK, PALE, GROUND = "#0f172a", "#64748b", "#ffffff"


def picture(width: int, height: int, title: str, about: str, body: Iterable[str]) -> str:
    """The text of a file: a heading and a line on what is shown, which take 60 px, and ``body`` below."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>',
        words(20, 30, title, size=17, weight=600), words(20, 50, about, fill=PALE), *body, "</svg>",
    ]) + "\n"  # fmt: skip


def words(
    x: float, y: float, text: str, *, fill: str = INK, size: int = 13, weight: int = 400, anchor: str = "start"
) -> str:
    """``text`` on the line ``y``; what of it stands at ``x`` is its ``anchor``: start, middle or end."""
    style = f'fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def bar(x: float, y: float, width: float, height: float, color: str) -> str:
    """A rectangle with round corners."""
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height}" rx="2" fill="{color}"/>'


def legend(entries: Iterable[tuple[str, str]], y: int) -> list[str]:
    """Names and their colours, side by side."""
    parts, x = [], 20
    for name, color in entries:
        parts += [bar(x, y, 11, 11, color), words(x + 17, y + 10, name, fill=PALE)]
        x += 40 + 7 * len(name)
    return parts
