"""Trainings whose steps grow costlier by phases: rows (share of the steps, ...), in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def phase_at(phases: Sequence[tuple[Any, ...]], progress: float) -> tuple[Any, ...]:
    """What the row says beside its share that holds at ``progress``, 0 to 1, through the run."""
    ends = np.cumsum([share for share, *_ in phases])
    return phases[min(int((progress >= ends).sum()), len(phases) - 1)][1:]
