"""Decides call by call whether a model's attention becomes sparse, and counts what it decided and why.

Speaks ComfyUI's attention-override protocol without importing ComfyUI, so that the same function serves the native
models there and the engine's own pipeline. All state of one forward pass lives in its ``transformer_options``; what a
layer does was settled before the forward (``prepare``), or is at its first call where nobody prepared it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from ..head_patterns import LayerPattern
from ..plan import TilePlan
from ..tiles import TilePattern
from .calls import Call, calls_of
from .clock import DENSE, SPARSE
from .dense_call import DenseCall, function_name
from .dispatch import tile_attention
from .layout import TokenLayout
from .padding import as_heads, fill_in, without_padding
from .prepare import Preparation
from .reasons import ANOTHER_LENGTH, tokens_of, why_no_pattern, why_not_the_video
from .report import AttentionReport
from .residual import work_with
from .state import FORWARD_KEY, FileAttention, ForwardState, Override, computing


def make_attention_override(
    plan: TilePlan, report: AttentionReport, *, previous: Override | None = None, **settings: Any
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]``, for a model that nobody prepares.

    ``previous`` is another node's override, asked for every dense piece; ``settings`` are those of ``Preparation``.
    """
    return attention_override(Preparation(plan, report, **settings), previous=previous)


def attention_override(preparation: Preparation, *, previous: Override | None = None) -> Override:
    """An override under a plan: self-attention over the published token layout runs under the plan's pattern;
    everything else goes to ``previous`` (another node's override) or to the backend untouched.

    q, k, v are tensors, or containers that ComfyUI lets a function take them out of.
    """
    previous_name = function_name(previous) if previous is not None else ""

    # A plain closure: ComfyUI deep-copies model options, and functions survive that as they are.
    def override(
        func: Override,
        q: Any,
        k: Any,
        v: Any,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        call = AttentionCall(q, k, v, heads, mask, skip_reshape, skip_output_reshape)
        dense = DenseCall(func, previous, attn_precision, kwargs, previous_name)
        options = kwargs.get("transformer_options") or {}
        state: ForwardState | None = options.get(FORWARD_KEY)
        if state is not None and (state.busy or state.owner not in (None, preparation)):
            return call.dense(dense)
        report = _counted_by(preparation, state)
        reason = why_not_the_video(state, call.shape, call.keys, mask, skip_reshape)
        if state is not None and state.layout is not None and not reason:
            return _over_the_video(preparation, call, dense, state, options)
        if state is not None and state.layout is not None and reason == ANOTHER_LENGTH:
            _warn_of_length(tokens_of(call.shape, skip_reshape), state.layout, preparation.report)
        report.add_dense(reason)
        with computing(state):
            return call.dense(dense.as_the_file_asks(_asked_by_the_file(state, options), video=False))

    override.pattern_of = preparation.pattern_of  # pyright: ignore[reportFunctionMemberAccess]
    override.preparation = preparation  # pyright: ignore[reportFunctionMemberAccess]
    return override


@dataclass
class AttentionCall:
    """One call as ComfyUI makes it: q, k, v are tensors or containers, (B, H, N, D) with ``skip_reshape``, else
    (B, N, H * D)."""

    q: Any
    k: Any
    v: Any
    heads: int
    mask: Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_peek(self.q).shape)

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(_peek(self.k).shape)

    def dense(self, dense: DenseCall) -> Tensor:
        """As it was asked for."""
        form = {"skip_reshape": self.skip_reshape, "skip_output_reshape": self.skip_output_reshape}
        return dense.call(self.q, self.k, self.v, self.heads, self.mask, **form)

    def queries(self, padding: range) -> Tensor:
        """A view with the shape, strides, dtype and device of the queries (B, H, N, D) without padding."""
        shaped = as_heads(_peek(self.q), self.heads, self.skip_reshape)
        return shaped[:, :, : shaped.shape[2] - len(padding)]

    def take(self, padding: range) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (B, H, N, D) without padding, out of their containers."""
        taken = (x if isinstance(x, Tensor) else x.take() for x in (self.q, self.k, self.v))
        self.q = self.k = self.v = None  # so that what is taken can be freed
        q, k, v = (as_heads(x, self.heads, self.skip_reshape, padding) for x in taken)
        return q, k, v

    def give(self, out: Tensor, padding: range) -> Tensor:
        """What the call returns, from (B, H, N, D) without padding."""
        out = fill_in(out, padding)  # nothing reads what padding attends to
        return out if self.skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")


def _over_the_video(
    preparation: Preparation, call: AttentionCall, dense: DenseCall, state: ForwardState, options: dict[str, Any]
) -> Tensor:
    """A self-attention over the video: under its layer's pattern, or dense with the reason counted."""
    assert state.layout is not None
    report = _counted_by(preparation, state)
    layer = state.next_layer(options, call.heads)
    work = preparation.layer(state, layer, options.get("total_blocks"))
    for note in work.notes:
        preparation.report.warn(*note)
    dense = dense.as_the_file_asks(_asked_by_the_file(state, options), video=True)
    reason = why_no_pattern(state, state.layout, call.mask) or work.reason
    padding = state.masked(call.mask)
    layout, pattern = without_padding(state.layout, padding), work.pattern.of_heads(state.first_head, call.heads)
    backends: dict[TilePattern, str] = {}
    if not reason:
        backends = preparation.backends_of(state, call.queries(padding), layout, pattern, dense)
        own_scale = dense.kwargs.get("scale") is not None
        if own_scale:  # only dense calls hand it on
            backends = {p: "dense" if p.is_full(layout.grid.t) or p.means else "frames" for p in backends}
        if set(backends.values()) == {"dense"}:
            reason = "a scale of its own" if own_scale else "measured faster"
    if reason:
        report.add_dense(reason, dense.name)
        with computing(state), report.clock.taking(DENSE, _peek(call.q)):
            return call.dense(dense)
    residual = state.residual if layer is not None else None
    renew = residual is not None and residual.renew
    density = work_with(_computed_share(pattern, backends, call.heads, layout), float(renew))
    report.add_sparse(density, _computed_by(calls_of(pattern, call.heads, backends, layout.grid.t), dense))
    with computing(state), report.clock.taking(SPARSE, _peek(call.q), density):
        q, k, v = call.take(padding)

        def sparse() -> Tensor:
            return tile_attention(q, k, v, layout, pattern, dense=dense, backend=backends)

        if residual is None or layer is None:
            out = sparse()
        else:
            out = residual.attend((layer, state.visit), state.first_head, sparse, lambda: dense(q, k, v))
            if residual.unlike:
                text = "attention of another batch or size than the latents' goes without the cached residual."
                preparation.report.warn("residual of another size", text)
    return call.give(out, padding)


def _counted_by(preparation: Preparation, state: ForwardState | None) -> AttentionReport:
    return preparation.report if state is None or state.report is None else state.report


def _computed_share(pattern: LayerPattern, backends: dict[TilePattern, str], heads: int, layout: TokenLayout) -> float:
    """The share of dense FLOPs; heads that were measured faster dense are."""
    extra, groups = layout.prefix + layout.suffix, pattern.head_groups(heads)
    shares = {p: 1.0 if backends[p] == "dense" else p.flop_density(layout.grid, extra) for p in groups}
    return sum(len(members) * shares[p] for p, members in groups.items()) / heads


def _computed_by(calls: list[Call], dense: DenseCall) -> str:
    """What computes the groups of a layer's heads, for the report."""
    by_name = {"frames": dense.name, "dense": dense.name, "parts": f"{dense.name} in parts"}
    return " and ".join(dict.fromkeys(by_name.get(call.backend, call.backend) for call in calls))


def _asked_by_the_file(state: ForwardState | None, options: dict[str, Any]) -> FileAttention | None:
    layer = state.given_layer(options) if state is not None and state.file_attention else None
    return state.file_attention.get(layer) if state is not None and layer is not None else None


def _peek(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else x.peek()


def _warn_of_length(tokens: int, layout: TokenLayout, report: AttentionReport) -> None:
    report.warn(
        ANOTHER_LENGTH,
        f"attention over {tokens} tokens stays dense: the video and the tokens beside it should be {layout.tokens} "
        f"({layout.prefix} + {layout.grid.t} frames of {layout.grid.tokens_per_frame} + {layout.suffix}). "
        "Another node may add or drop tokens.",
    )
