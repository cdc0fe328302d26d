"""A plan made ready for a forward: what every layer does, and with which backend, settled before its first block.

Nothing is measured inside a block, and nothing that outlives the block is allocated there: ComfyUI may record a block's
allocations and replay them at the next step, and a tensor that it does not see freed is lost to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...plan import TilePlan
from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from ..backends.registry import check_means
from ..call_shape import CallShape
from ..dense_call import DenseCall
from ..layout import TokenLayout
from ..report.reason_names import BEYOND_THE_LAYERS, RENEWED_TOO_OFTEN
from ..report.report import AttentionReport
from .backend_choices import MOST_REMEMBERED, BackendChoices
from .padding import without_padding
from .reasons import why_not_worth_it
from .residual import Place, ResidualCache, Room, why_no_residual, work_with
from .state import ForwardState

MUCH_SPARSER = 0.8  # of the density at the plan's length: a longer clip is warned of


class Note(NamedTuple):
    """What a run says once: a warning, or for who wants to know."""

    about: str
    text: str
    warns: bool = True


@dataclass(frozen=True)
class LayerWork:
    """What a layer does with its self-attention over the video.

    ``reason`` says why it stays dense, "" = it follows ``pattern`` at ``density``, the share of dense FLOPs.
    """

    pattern: LayerPattern
    reason: str
    density: float
    notes: tuple[Note, ...] = ()


BEYOND = LayerWork(
    TilePattern(None),
    BEYOND_THE_LAYERS,
    1.0,
    (Note(BEYOND_THE_LAYERS, "the model attends more often than it has layers: the rest stays dense."),),
)


class Preparation:
    """One plan on one model, as its forwards need it. Safe for several threads.

    Args:
        plan: which frames each layer attends to.
        report: what is counted and warned of.
        min_tokens: calls with fewer video tokens stay dense.
        placement: where the reference frames stand, one of ``tiles.PLACEMENTS``.
        decline_slow: patterns that would not be faster than dense, by rule or as measured, stay dense.
        backend: as of ``tile_attention``.
        residual_every: keep the difference to dense attention for so many steps (``residual``), 0 = never.

    Raises ValueError for an unknown placement, for rotating reference frames with a residual, and for mean frames with a
    backend that computes none.
    """

    def __init__(
        self,
        plan: TilePlan,
        report: AttentionReport,
        *,
        min_tokens: int = 0,
        placement: str = "strided",
        decline_slow: bool = False,
        backend: str = "auto",
        residual_every: int = 0,
    ) -> None:
        TilePattern(None).placed(placement)  # refuses an unknown one now, and not in the middle of a run
        if residual_every and placement == "rotating":
            raise ValueError(
                "A cached residual is the difference to a pattern that stays, but the placement is rotating. Set placement to "
                "strided, or residual_every to 0."
            )
        if any(kind.means for pattern in (*plan.patterns, plan.uniform_pattern) if pattern for kind in pattern.kinds):
            check_means(backend)
        self.plan, self.report = plan, report
        self.residual = ResidualCache(residual_every) if residual_every else None
        self.choices = BackendChoices(report, backend, decline_slow)
        self.min_tokens, self.placement, self.decline_slow = min_tokens, placement, decline_slow
        self.lock = threading.Lock()
        self.work: dict[Any, LayerWork] = {}

    def before_forward(
        self, state: ForwardState, shape: CallShape, dense_of: Callable[[int], DenseCall]
    ) -> ForwardState:
        """The forward of ``state`` settled: each layer's work and, for its calls, the backends.

        ``shape`` is of all heads; ``dense_of`` gives a layer's dense attention. Measures backends that were never
        measured, and makes what they keep on the device. Call it outside of whatever records or compiles the model's blocks.
        """
        if state.layout is None or state.depth is None:
            return state
        if state.active or state.later:  # for those that follow room is made, which layers that stay dense do not need
            slow = self.slow_layers(state, shape, dense_of)
            state = replace(state, slow=slow, settled=True)
        return self.keep_residual(state, shape)

    def slow_layers(
        self, state: ForwardState, shape: CallShape, dense_of: Callable[[int], DenseCall]
    ) -> frozenset[int]:
        """Settles every layer's backends; those layers that would be sparse, and stay dense by them. Arguments as of
        `before_forward`, of an active forward whose layout is known."""
        layout = state.layout
        assert layout is not None
        wanted = self.choices.wanted(shape)
        layouts, renewed = {layout, without_padding(layout, state.padding)}, self._renewed(state)
        slow = set[int]()
        for layer in range(state.depth or 0):
            work = self.layer(state, layer)
            if work.reason:
                continue
            dense = dense_of(layer)
            backends = {
                backend
                for shape, first_head, precise in wanted
                for found in layouts
                for backend in self.choices.settle(
                    shape, found, work.pattern.of_heads(first_head, shape.heads), dense.at(precise), renewed
                ).values()
            }
            if backends == {"dense"}:
                slow.add(layer)
        return frozenset(slow)

    def keep_residual(self, state: ForwardState, shape: CallShape) -> ForwardState:
        """The forward of ``state``, whose calls look like ``shape``, renewing or adding the cached residual, where one is
        kept. A forward that is not active yet makes room for those that follow.

        Raises ValueError where there is no memory for it.
        """
        places = self._places_with_residual(state)
        if self.residual is None or state.layout is None or not places:
            return state
        if state.active:
            begun = self.residual.begin(state.branches, places, state.step, shape, state.layout.tokens)
            return replace(state, residual=begun)
        self.residual.reserve(state.branches, places, shape, state.layout.tokens)
        return state

    def residual_room(self, state: ForwardState, shape: CallShape, beside: int = 0) -> Room | None:
        """Where `keep_residual` would keep it for forwards such as this one, and its bytes; None where none is kept.
        Nothing is taken; ``beside`` as of ``ResidualCache.room``.

        Raises ValueError where there is no memory for it.
        """
        places = self._places_with_residual(state)
        if self.residual is None or state.layout is None or not places:
            return None
        return self.residual.room(state.branches, places, shape, state.layout.tokens, beside)

    def _places_with_residual(self, state: ForwardState) -> list[Place]:
        """Those of the sparse layers, where a run keeps one; where it does not, the report says why."""
        if self.residual is None or state.layout is None or state.depth is None or not (state.active or state.later):
            return []
        if why := _why_no_residual(self.residual, state):
            self.report.warn("residual", f"no residual is kept: {why}.")
            return []
        if state.layout.grid.t == 1:
            return []
        sparse = [layer for layer in range(state.depth) if not self.layer(state, layer).reason]
        return state.places(layer for layer in sparse if layer not in state.slow)

    def _renewed(self, state: ForwardState) -> float:
        """The share of this run's sparse calls that compute dense attention as well, to renew the residual; 0 to 1."""
        return 0.0 if self.residual is None or _why_no_residual(self.residual, state) else 1 / self.residual.every

    def layer(self, state: ForwardState, layer: int | None, total: int | None = None) -> LayerWork:
        """What a layer does in the forward of ``state``; ``total`` is the depth where the state has none."""
        assert state.layout is not None
        if layer is None:
            return BEYOND
        step = state.step if self.placement == "rotating" else 0
        key = (state.layout, layer, state.depth or total, step, self._renewed(state))
        work = self.work.get(key)
        if work is None:
            work = self._work(*key)
            with self.lock:
                if len(self.work) >= MOST_REMEMBERED:
                    self.work.clear()
                self.work[key] = work
        return work

    def _work(self, layout: TokenLayout, layer: int, depth: int | None, step: int, renewed: float) -> LayerWork:
        pattern, notes = pattern_for_frames(self.plan, layer, depth, layout.grid.t)
        pattern = pattern.placed(self.placement, step)
        density = pattern.flop_density(layout.grid, layout.prefix + layout.suffix)
        reason = why_not_worth_it(layout, pattern, self.min_tokens, self.decline_slow, renewed)
        if reason == RENEWED_TOO_OFTEN:
            text = (
                f"renewing the residual every {round(1 / renewed)} steps brings a layer to {work_with(density, renewed):.0%} of dense "
                f"attention's work (layer {layer}): such layers stay dense. Raise residual_every, or set it to 0."
            )
            notes = (*notes, Note(RENEWED_TOO_OFTEN, text))
        return LayerWork(pattern, reason, density, notes)

    def tell(self, work: LayerWork) -> None:
        """What is to say of a layer goes into the log, once a run."""
        for about, text, warns in work.notes:
            (self.report.warn if warns else self.report.note)(about, text)

    def density(self, state: ForwardState) -> float:
        """The share of dense attention's FLOPs that all layers of an active forward compute, 0 to 1."""
        work = [self.layer(state, layer) for layer in range(state.depth or 0)]
        return sum(1.0 if w.reason else w.density for w in work) / len(work) if work else 1.0

    def pattern_of(self, state: ForwardState, layer: int) -> LayerPattern:
        """A layer's pattern, for those who must know it before its attention is called; full where it stays dense."""
        if state.layout is None or state.layout.grid.t == 1 or not state.active:
            return TilePattern(None)
        work = self.layer(state, layer)
        return TilePattern(None) if work.reason else work.pattern

    def backends_of(
        self,
        state: ForwardState,
        shape: CallShape,
        layout: TokenLayout,
        pattern: LayerPattern,
        dense: DenseCall,
        first_head: int = 0,
    ) -> dict[TilePattern, str]:
        """The backend of each group of heads for a call of this shape, from ``first_head`` of its layer on; measured here
        where the forward was not settled."""
        renewed = self._renewed(state)
        if not state.settled:
            return self.choices.settle(shape, layout, pattern, dense, renewed)
        return self.choices.of_call(shape, layout, pattern, dense, first_head, renewed)

    def forget(self) -> None:
        """Lets go of what a run left in memory."""
        with self.lock:
            self.work.clear()
        self.choices.forget()
        if self.residual is not None:
            self.residual.clear()


def _why_no_residual(residual: ResidualCache, state: ForwardState) -> str:
    """Why this run keeps none, whatever its layers are; "" = it keeps one."""
    why = state.no_residual or why_no_residual(residual.every, state.steps, state.whole)
    return why or ("" if state.branches else "the prompts of the batch are not known")


def pattern_for_frames(
    plan: TilePlan, layer: int, depth: int | None, frames: int
) -> tuple[LayerPattern, tuple[Note, ...]]:
    """The plan's pattern of a layer for a run of ``frames`` latent frames, and notes where it is not the plan's own or does not
    do there what it did at the plan's."""
    planned = plan.pattern(layer, depth)
    pattern = planned.scaled(plan.frames, frames)
    now, then = (sorted({p.k for p in x.kinds if p.k is not None}) for x in (pattern, planned))
    if now != then and pattern != planned:
        counts = " and ".join(map(str, now)) or "all", " and ".join(map(str, then))
        text = (
            f"the plan was made for {plan.frames} latent frames and the run has {frames}: the distance between reference "
            f"frames is kept, so that there are fewer of them (layer {layer}: {counts[0]} instead of {counts[1]})."
        )
        return pattern, (Note("scaled", text, warns=False),)
    most = max(then, default=0)
    if most > frames > 1:
        text = f"the plan has {most} reference frames and the run {frames} latent frames: full attention."
        return pattern, (Note("k above the frames", text),)
    if plan.frames is not None and frames > plan.frames:
        here, there = pattern.density(frames), pattern.density(plan.frames)
        if here < MUCH_SPARSER * there:
            text = (
                f"the plan was made for {plan.frames} latent frames and the run has {frames}, of which each sees as many as before: "
                f"{here:.0%} of the attention is computed in place of {there:.0%} (layer {layer}), and the clip suffers more. "
                "Take more reference frames, or a plan for this length."
            )
            return pattern, (Note("much sparser", text),)
    return pattern, ()
