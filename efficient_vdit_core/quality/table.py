"""The metrics of a comparison as lines of text."""

from __future__ import annotations

import math

from ..limits.quote import printable, shortened
from .metrics import ClipComparison

MAX_LABEL = 60  # letters of a clip's name


def label(name: str) -> str:
    """A clip's name as it is shown: one line, printable, and short."""
    return shortened(printable(" ".join(shortened(name, 4 * MAX_LABEL).split())), MAX_LABEL)


def metrics_rows(comparison: ClipComparison, a: str = "a", b: str = "b") -> list[tuple[str, str, str]]:
    """(metric, value, how to read it), in the order of a table; ``a`` and ``b`` are the clips' names."""
    c, a, b = comparison, label(a), label(b)
    lpips = f"{c.lpips:.4f}" if c.lpips is not None else "-"
    return [
        ("PSNR", decibels(c.psnr), "higher is closer"),
        ("SSIM", f"{c.ssim:.4f}", "1 is identical"),
        ("temporal PSNR", decibels(c.temporal_psnr), "of the changes from frame to frame"),
        (f"motion of {a}", _percent(c.motion_a), "mean change from frame to frame"),
        (f"motion of {b}", _percent(c.motion_b), "mean change from frame to frame"),
        ("motion ratio", "-" if c.motion_ratio is None else f"{c.motion_ratio:.2f}", f"{b} over {a}; 1 moves as much"),
        ("LPIPS", lpips, "0 is identical" if c.lpips is not None else c.lpips_note),
    ]


def metrics_table(comparison: ClipComparison, a: str = "a", b: str = "b") -> str:
    """The rows in columns, under a line that says what was compared."""
    a, b = label(a), label(b)
    rows = metrics_rows(comparison, a, b)
    name_width, value_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{b} against {a}: {clip_size(comparison)}"]
    lines += [f"{name:<{name_width}}  {value:>{value_width}}  {reading}".rstrip() for name, value, reading in rows]
    return "\n".join(lines)


def clip_size(comparison: ClipComparison) -> str:
    """How many frames, of how many pixels."""
    return f"{comparison.frames} frame{'s' * (comparison.frames != 1)}, {comparison.width}x{comparison.height}"


def decibels(value: float | None) -> str:
    """A PSNR for people."""
    return "-" if value is None else "identical" if math.isinf(value) else f"{value:.2f} dB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.2f} %"
