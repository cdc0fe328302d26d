"""Numbers of users and of files: whole or finite, and within a range that the message names."""

from __future__ import annotations

import math
from typing import Any

from .quote import quoted

# PyTorch's generator on the CPU takes the low 32 bits: a larger seed gives what a smaller one does. There is room for the seeds
# that are counted on from it, one for each process or clip.
MAX_TORCH_SEED = 2**32 - 2**20


def whole(value: Any, name: str, low: int, high: int, why: str = "") -> int:
    """``value`` where it is an int of ``low`` to ``high``; ValueError names it, the range and ``why``, a sentence."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {quoted(value)}, expected a whole number from {low} to {high:,}. {why}".rstrip())
    return value


def number(value: Any, name: str, low: float, high: float = math.inf, *, above: bool = False, why: str = "") -> float:
    """``value`` as a float where it is finite and within ``low`` to ``high``, or ``above`` low; else ValueError."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
    if not usable or not low <= value <= high or (above and value == low):
        to = "" if math.isinf(high) else f" to {high:g}"
        where = f"above {low:g}{' and up' * bool(to)}{to}" if above else f"from {low:g}{to or ' up'}"
        raise ValueError(f"{name} is {quoted(value)}, expected a number {where}. {why}".rstrip())
    return float(value)
