"""How far apart two models are on the same captions and noises: in pairs, so that what a clip asks is the same for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..limits.quote import quoted
from .moving.figures import interval

# Of the figures of `evaluate`: what must be the same, or clips of one number are no pair.
SAME = ("world", "captions", "first_seed")


def difference(one: dict[str, Any], other: dict[str, Any], captions: Sequence[str]) -> dict[str, Any]:
    """What the figures ``one`` of `evaluate` have more than those of ``other``, of clips of ``captions``.

    all_right: the difference of the shares, with its 95 % interval over captions: that of the differences of pairs, which is
    narrower than two shares' own would make it. one_alone, other_alone: clips that are right in that one only. Raises
    ValueError where the two were judged by other clips.
    """
    for name in SAME:
        if one.get(name) != other.get(name):
            raise ValueError(
                f"Of the two figures one has {name} {quoted(one.get(name))} and one {quoted(other.get(name))}: their clips are no pairs. "
                "Judge both models by the same --world and --captions."
            )
    first, second = (_right(figures, len(captions)) for figures in (one, other))
    return {
        "all_right": float((first - second).mean()),
        "all_right_interval": interval(first - second, captions),
        "one_alone": int((first > second).sum()),
        "other_alone": int((second > first).sum()),
        "clips": len(first),
        "distinct_captions": len(set(captions)),
    }


def _right(figures: dict[str, Any], clips: int) -> np.ndarray:
    """Which clips are right, 1.0 or 0.0."""
    right = figures.get("right")
    if not isinstance(right, str) or len(right) != clips or set(right) - set("01"):
        raise ValueError(
            f"right is {quoted(right)}, expected a 0 or 1 for each of {clips} clips. Judge the model anew by evdit tinyworld eval, "
            "to the end: an older version did not keep which clips were right."
        )
    return np.array([int(passed) for passed in right], dtype=float)
