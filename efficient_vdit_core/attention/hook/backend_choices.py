"""Which backend computes the calls of a forward: chosen before it, per shape, and looked up within it."""

from __future__ import annotations

import threading
from typing import Any

from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from ..backends.flex import forget_masks
from ..backends.head_calls import calls_of
from ..call_shape import CallShape
from ..dense_call import DenseAttention
from ..dispatch import group_shapes, make_ready
from ..layout import TokenLayout
from ..report.report import AttentionReport
from ..selection import forget_cramped, measured_choice, partial_for, unmeasured_backend

MOST_REMEMBERED, MOST_UNFORESEEN = 4096, 64


class BackendChoices:
    """The choices of one plan's calls. Safe for several threads. Arguments as of ``Preparation``."""

    def __init__(self, report: AttentionReport, backend: str, decline_slow: bool) -> None:
        self.report, self.backend, self.decline_slow = report, backend, decline_slow
        self.lock = threading.Lock()
        self.chosen: dict[Any, str] = {}
        # Calls that no forward was prepared for: their shapes, from which of the layer's heads on they are, and whether they
        # ask for full precision.
        self.unforeseen: set[tuple[CallShape, int, bool]] = set()

    @property
    def may_decline(self) -> bool:
        """Whether a trial may find that a sparse layer is to stay dense."""
        return self.decline_slow and self.backend == "auto"

    def wanted(self, shape: CallShape) -> set[tuple[CallShape, int, bool]]:
        """The calls to prepare a forward for, whose own are of this shape: those that were not foreseen before too."""
        with self.lock:
            return {(shape, 0, False), *self.unforeseen}

    def settle(
        self, shape: CallShape, layout: TokenLayout, pattern: LayerPattern, dense: DenseAttention, renewed: float = 0.0
    ) -> dict[TilePattern, str]:
        """The backend of each group of heads of these calls, measured where it never was; ``dense`` only where slow
        patterns are declined, or nothing is left out. ``renewed``: the share of the calls that compute dense attention as
        well."""
        backends = {p: self._backend(s, layout, p, dense, renewed) for p, s in group_shapes(shape, pattern).items()}
        for call in calls_of(pattern, shape.heads, backends, layout.grid.t):
            make_ready(call, shape, layout, dense)
        return backends

    def _backend(
        self, shape: CallShape, layout: TokenLayout, pattern: TilePattern, dense: DenseAttention, renewed: float
    ) -> str:
        key = (shape, layout, pattern, dense.identity, renewed)
        chosen = self.chosen.get(key)
        if chosen is None:
            chosen = "dense" if pattern.is_full(layout.grid.t) else self.backend
            if (pattern.means or chosen == "parts") and partial_for(dense, shape) is None:
                if pattern.means:
                    text = f"PyTorch's attention computes mean frames, and {dense.name} all other calls; nothing to do."
                    self.report.note("mean frames", text)
                else:
                    text = f"{dense.name} does not tell its log-sum-exp, which the backend parts needs: frames is used."
                    self.report.warn("parts", text)
                    chosen = "frames"
            if chosen == "auto":
                chosen = self._fastest(shape, layout, pattern, dense, renewed)
            if len(self.chosen) >= MOST_REMEMBERED:
                self.chosen.clear()
            self.chosen[key] = chosen
        return chosen

    def _fastest(
        self, shape: CallShape, layout: TokenLayout, pattern: TilePattern, dense: DenseAttention, renewed: float
    ) -> str:
        """The backend that a trial finds fastest; that of no trial where another node's attention fails in one, which asks it
        before the model runs."""
        try:
            choice = measured_choice(shape, layout, pattern, dense=dense)
        except Exception as error:
            if dense.previous is None:
                raise
            why = f"{dense.name} cannot be timed before the model runs ({type(error).__name__}: {error})"
            self.report.warn("trial", f"{why}: no backend is measured beside it.")
            return unmeasured_backend(shape, pattern, dense)
        if choice.milliseconds:
            self.report.add_trial(pattern.name(layout.grid.t), choice.times())
        return choice.paying(renewed) if self.decline_slow else choice.sparse()

    def of_call(
        self,
        shape: CallShape,
        layout: TokenLayout,
        pattern: LayerPattern,
        dense: DenseAttention,
        first_head: int,
        renewed: float,
    ) -> dict[TilePattern, str]:
        """The backends of a call within a settled forward, from ``first_head`` of its layer on. A call that was not foreseen
        is computed by what needs no trial; the next forward is prepared for it."""
        shapes = group_shapes(shape, pattern)
        found = {p: self.chosen.get((s, layout, p, dense.identity, renewed)) for p, s in shapes.items()}
        if None in found.values():
            with self.lock:
                if len(self.unforeseen) < MOST_UNFORESEEN:
                    self.unforeseen.add((shape, first_head, dense.precise))
        return {p: chosen or self._unmeasured(shapes[p], p, dense) for p, chosen in found.items()}

    def _unmeasured(self, shape: CallShape, pattern: TilePattern, dense: DenseAttention) -> str:
        return "frames" if self.backend == "frames" else unmeasured_backend(shape, pattern, dense)

    def forget(self) -> None:
        """Lets go of what a run left in memory. What was measured stays in the book on disk, and the next run is prepared for
        the shapes that this one met."""
        with self.lock:
            self.chosen.clear()
        forget_masks()
        forget_cramped()
