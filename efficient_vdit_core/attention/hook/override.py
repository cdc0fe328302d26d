"""Decides call by call whether a model's attention becomes sparse, and counts what it decided and why.

Speaks ComfyUI's attention-override protocol without importing ComfyUI, so that the same function serves the native
models there and the engine's own pipeline. All state of one forward pass lives in its ``transformer_options``; what a
layer does was settled before the forward (``prepare``), or is at its first call where nobody prepared it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...plan import TilePlan
from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from ..backends.frames import Dense
from ..backends.head_calls import calls_of
from ..call_shape import CallShape
from ..dense_call import DenseCall, FileAttention, Override
from ..dispatch import describe_call, tile_attention
from ..layout import TokenLayout
from ..report.clock import DENSE, SPARSE
from ..report.reason_names import ANOTHER_LENGTH, MEASURED_FASTER, OWN_SCALE
from ..report.report import AttentionReport
from .attention_call import AttentionCall, override_by
from .padding import without_padding
from .prepare import Preparation
from .reasons import why_no_pattern, why_not_the_video
from .residual import work_with
from .state import CallPlace, ForwardState


def make_attention_override(
    plan: TilePlan, report: AttentionReport, *, previous: Override | None = None, **settings: Any
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]``, for a model that nobody prepares.

    ``previous`` is another node's override, asked for every dense piece; ``settings`` are those of ``Preparation``.
    """
    return attention_override(Preparation(plan, report, **settings), previous=previous)


def attention_override(preparation: Preparation, *, previous: Override | None = None) -> Override:
    """An override under a plan: self-attention over the published token layout runs under the plan's pattern;
    everything else goes to ``previous`` (another node's override) or to the backend untouched."""

    def answer(call: AttentionCall) -> Tensor:
        state = call.state
        if state is not None and (state.counter.busy or state.owner not in (None, preparation)):
            return call.dense()
        reason = why_not_the_video(call)
        if state is not None and state.layout is not None:
            if not reason:
                return _over_the_video(preparation, call, state, state.layout)
            if reason == ANOTHER_LENGTH:
                _warn_of_length(call.tokens, state.layout, preparation.report)
        _counted_by(preparation, state).add_dense(reason)
        with nullcontext() if state is None else state.computing():
            return call.dense(call.asked.as_the_file_asks(_asked_by_the_file(call), video=False))

    return override_by(answer, previous)


@dataclass(frozen=True)
class _Sparse:
    """What a sparse call does: its place, where its tokens stand without padding, and the pattern and backends of its
    heads."""

    place: CallPlace
    layout: TokenLayout
    pattern: LayerPattern
    backends: dict[TilePattern, str]


def _over_the_video(preparation: Preparation, call: AttentionCall, state: ForwardState, whole: TokenLayout) -> Tensor:
    """A self-attention over the video: under its layer's pattern, or dense with the reason counted. ``whole`` is the layout
    with its padding."""
    dense = call.asked.as_the_file_asks(_asked_by_the_file(call), video=True)
    sparse, reason = _decide(preparation, call, state, whole, dense)
    if sparse is not None:
        return _compute(preparation, call, state, sparse, dense)
    report = _counted_by(preparation, state)
    report.add_dense(reason, dense.name)
    with state.computing(), report.clock.taking(DENSE, call.query):
        return call.dense(dense)


def _decide(
    preparation: Preparation, call: AttentionCall, state: ForwardState, whole: TokenLayout, dense: DenseCall
) -> tuple[_Sparse | None, str]:
    """How this call of the forward becomes sparse, or None and the reason why it stays dense. Counts it."""
    again = state.counter.ended
    place = _computed_again(preparation, state) if again else state.next_call(call.options, call.heads)
    layer = None if place is None else place.layer
    work = preparation.layer(state, layer, call.options.get("total_blocks"))
    preparation.tell(work)
    reason = why_no_pattern(state, whole, call.mask) or work.reason
    if reason or place is None:
        return None, reason
    layout = without_padding(whole, state.masked(call.mask))
    pattern = work.pattern.of_heads(place.first_head, call.heads)
    backends = preparation.backends_of(state, call.shape, layout, pattern, dense, place.first_head)
    own_scale = dense.kwargs.get("scale") is not None
    if own_scale:  # only dense calls hand it on
        backends = {p: "dense" if p.is_full(layout.grid.t) or p.means else "frames" for p in backends}
    if set(backends.values()) == {"dense"}:
        return None, OWN_SCALE if own_scale else MEASURED_FASTER
    return _Sparse(place, layout, pattern, backends), ""


def _compute(
    preparation: Preparation, call: AttentionCall, state: ForwardState, it: _Sparse, dense: DenseCall
) -> Tensor:
    """The call under its pattern, with the cached residual where one is kept."""
    report, residual, padding = _counted_by(preparation, state), state.residual, state.masked(call.mask)
    density = work_with(_computed_share(it, call.heads), float(state.renews))
    report.add_sparse(density, computed_by(it.pattern, call.shape, it.backends, it.layout.grid.t, dense))
    with state.computing(), report.clock.taking(SPARSE, call.query, density):
        q, k, v = call.take(padding)

        def sparse() -> Tensor:
            return tile_attention(q, k, v, it.layout, it.pattern, dense=dense, backend=it.backends)

        if residual is None:
            out = sparse()
        else:
            out = residual.attend(it.place[:2], it.place.first_head, sparse, lambda: dense(q, k, v))
            if residual.unlike:
                text = "attention of another batch or size than the latents' goes without the cached residual."
                preparation.report.warn("residual of another size", text)
    return call.give(out, padding)


def _computed_again(preparation: Preparation, state: ForwardState) -> CallPlace:
    """Of a block that is computed again by itself: nothing tells which one it is, so all layers must be alike. Raises
    ValueError where they are not."""
    work = [preparation.layer(state, layer) for layer in range(state.depth or 0)]
    if len({(of_layer.pattern, of_layer.reason) for of_layer in work}) > 1:
        raise ValueError(
            "Gradient checkpointing computes single blocks again, and nothing tells which layers of the plan these are, which differ. "
            "Set checkpoint_depth to 1, switch gradient checkpointing off, or take one pattern for all layers."
        )
    return CallPlace(0, 0, 0)


def _counted_by(preparation: Preparation, state: ForwardState | None) -> AttentionReport:
    return preparation.report if state is None or state.report is None else state.report


def _computed_share(it: _Sparse, heads: int) -> float:
    """The share of dense FLOPs; heads that were measured faster dense are."""
    layout, groups = it.layout, it.pattern.head_groups(heads)
    extra = layout.prefix + layout.suffix
    shares = {p: 1.0 if it.backends[p] == "dense" else p.flop_density(layout.grid, extra) for p in groups}
    return sum(len(members) * shares[p] for p, members in groups.items()) / heads


def computed_by(
    pattern: LayerPattern, shape: CallShape, backends: dict[TilePattern, str], frames: int, dense: Dense
) -> str:
    """What computes the groups of a layer's heads, for the report."""
    calls = calls_of(pattern, shape.heads, backends, frames)
    return " and ".join(dict.fromkeys(describe_call(call, shape, dense) for call in calls))


def _asked_by_the_file(call: AttentionCall) -> FileAttention | None:
    state = call.state
    layer = state.given_layer(call.options) if state is not None and state.file_attention else None
    return state.file_attention.get(layer) if state is not None and layer is not None else None


def _warn_of_length(tokens: int, layout: TokenLayout, report: AttentionReport) -> None:
    report.warn(
        ANOTHER_LENGTH,
        f"attention over {tokens} tokens stays dense: the video and the tokens beside it should be {layout.tokens} "
        f"({layout.prefix} + {layout.grid.t} frames of {layout.grid.tokens_per_frame} + {layout.suffix}). "
        "Another node may add or drop tokens.",
    )
