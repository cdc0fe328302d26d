"""What a probing run finds: the error and the seconds of each layer under each candidate."""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..attention import TokenLayout
from ..attention.hook.state import CallPlace
from ..tiles import TilePattern

ATTENTION, BLOCK, OUTPUT = "attention", "block", "output"
MEASURES = (ATTENTION, BLOCK, OUTPUT)
DENSE = None  # the key of dense attention's seconds


@dataclass
class HeadErrors:
    """Squared errors of a layer's heads relative to the layer, a mean over calls.

    Where a layer's heads come in several calls, each of them is taken as its share of the heads.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    calls: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, first: int, squared: np.ndarray) -> None:
        """The heads (h,) of one call, from head ``first`` on."""
        missing = max(first + len(squared) - len(self.sums), 0)
        self.sums, self.calls = (np.pad(x, (0, missing)) for x in (self.sums, self.calls))
        self.sums[first : first + len(squared)] += squared * len(squared)
        self.calls[first : first + len(squared)] += 1

    @property
    def mean(self) -> np.ndarray:
        """(H,)"""
        return self.sums / (np.maximum(self.calls, 1) * len(self.sums))


@dataclass(frozen=True)
class Replay:
    """What is computed again: attention under ``pattern`` in every call, of one block, or in those of ``layer`` alone."""

    pattern: TilePattern
    layer: int | None = None


@dataclass
class ProbeRecord:
    """What a probing run found: (layer, candidate) -> one value for each call. Safe to fill from several threads.

    A candidate is another pattern over another number of frames, so forwards over as many as the first one's ``layout`` are
    measured, and others, as context windows and prompts for a part of the clip may have them, are counted alone.
    ``timed``: also take the time of each attention call, which makes the run wait for the device. ``by_head``: and of a
    call for half of the heads, from which what a group of heads costs beside its work is known.
    """

    candidates: tuple[TilePattern, ...]
    timed: bool = False
    by_head: bool = False
    layout: TokenLayout | None = None
    errors: dict[str, dict[tuple[int, TilePattern], list[float]]] = field(
        default_factory=lambda: {m: defaultdict(list) for m in MEASURES}
    )
    heads: dict[tuple[int, TilePattern], HeadErrors] = field(default_factory=lambda: defaultdict(HeadErrors))
    seconds: dict[tuple[int, TilePattern | None], list[float]] = field(default_factory=lambda: defaultdict(list))
    # Of a call for some of the heads: their share, and its seconds.
    parts: dict[tuple[int, TilePattern | None], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    dense: Counter[str] = field(default_factory=Counter)
    other_frames: Counter[tuple[int, int]] = field(default_factory=Counter)  # calls left out, by (frames, layer)
    ran: set[Any] = field(default_factory=set)  # the kinds of calls that were made once without the clock
    dense_not_finite: bool = False  # whether a dense result held NaN or infinity
    replaying: Replay | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def error(self, layer: int, pattern: TilePattern, measure: str = ATTENTION) -> float:
        """Mean error of a layer over its calls; inf where one was not finite, NaN where there was none."""
        found = self.errors[measure].get((layer, pattern))
        return sum(found) / len(found) if found else math.nan

    def squared(self, layer: int, pattern: TilePattern, measure: str) -> float:
        """The mean of the error's square."""
        found = self.errors[measure][layer, pattern]
        return sum(error**2 for error in found) / len(found)

    @property
    def layers(self) -> list[int]:
        """Those whose attention was measured."""
        return sorted(self.calls)

    @property
    def calls(self) -> Counter[int]:
        """How often each layer's attention was measured."""
        return Counter({layer: len(found) for (layer, _), found in self.errors[ATTENTION].items()})

    def of_heads(self, layer: int, pattern: TilePattern, measure: str = ATTENTION) -> np.ndarray:
        """Squared errors of the heads (H,), whose sum is the layer's; one that no head has of its own is shared out as the
        attention's is."""
        attention = self.heads[layer, pattern].mean
        total = attention.sum()
        if measure == ATTENTION or not total:
            return attention
        return attention * (self.squared(layer, pattern, measure) / total)

    def cost(self, layer: int, pattern: TilePattern) -> float:
        """Time of the candidate as a share of the layer's dense time, both at their fastest call."""
        return min(self.seconds[layer, pattern]) / min(self.seconds[layer, DENSE])

    def call_cost(self, layer: int, pattern: TilePattern | None) -> float:
        """What a call costs whatever the number of its heads, as a share of the layer's dense time; 0 where no part was
        timed.

        A line through the times of all heads and of a part, both at their fastest: two groups are priced as they were
        timed, their heads gathered. More groups gather no more than two, so they are priced a little too high.
        """
        if (layer, pattern) not in self.parts:
            return 0.0
        whole = min(self.seconds[layer, pattern])
        share, part = min(self.parts[layer, pattern], key=lambda taken: taken[1])
        fixed = (part - share * whole) / (1 - share)
        return min(max(fixed, 0.0), whole) / min(self.seconds[layer, DENSE])

    def add(self, measure: str, layer: int, pattern: TilePattern, error: float) -> None:
        with self.lock:
            self.errors[measure][layer, pattern].append(error)

    def compared(self, measure: str, layer: int, pattern: TilePattern, error: float, exact: Tensor) -> None:
        """Adds an error against the dense result ``exact``. One that is not finite may be the candidate's fault or the model's
        own, so the dense result is looked at."""
        self.add(measure, layer, pattern, error)
        if not (math.isfinite(error) or self.dense_not_finite or exact.isfinite().all()):
            self.dense_not_finite = True

    def add_heads(self, layer: int, pattern: TilePattern, first: int, squared: np.ndarray) -> None:
        with self.lock:
            self.heads[layer, pattern].add(first, squared)

    def add_seconds(self, layer: int, pattern: TilePattern | None, seconds: float) -> None:
        with self.lock:
            self.seconds[layer, pattern].append(seconds)

    def add_part(self, layer: int, pattern: TilePattern | None, share: float, seconds: float) -> None:
        with self.lock:
            self.parts[layer, pattern].append((share, seconds))

    def add_dense(self, reason: str) -> None:
        with self.lock:
            self.dense[reason] += 1

    def takes(self, place: CallPlace, layout: TokenLayout) -> bool:
        """Whether a call over that layout is measured, which the first one decides; what is not is counted."""
        with self.lock:
            self.layout = self.layout or layout
            taken = layout.grid.t == self.layout.grid.t
            if not taken and not place.visit and not place.first_head:
                self.other_frames[layout.grid.t, place.layer] += 1
        return taken

    @property
    def left_out(self) -> dict[int, int]:
        """How many forwards were left out, by their number of frames."""
        lengths = sorted({frames for frames, _ in self.other_frames})
        return {t: max(count for (frames, _), count in self.other_frames.items() if frames == t) for t in lengths}
