"""Figures as JSON that can be read again."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any, indent: int) -> str:
    """``value`` as JSON with a line break at its end; null where a number is not finite, which no JSON holds."""
    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """``value`` with lists for tuples and None for numbers that are not finite, at any depth."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
