"""Decides call by call whether a model's attention becomes sparse, and counts what it decided and why.

Speaks ComfyUI's attention-override protocol without importing ComfyUI, so that the same function serves the native
models there and the engine's own pipeline. All state of one forward pass lives in its ``transformer_options``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

from ..plan import TilePlan
from ..tiles import TilePattern
from .clock import DENSE, SPARSE
from .dispatch import choose_backend, tile_attention
from .layout import TokenLayout
from .padding import fill_in, leave_out, without_padding
from .report import AttentionReport

FORWARD_KEY = "evdit"
ANOTHER_LENGTH = "another sequence length"

Override = Callable[..., Tensor]

# Below this many latent frames, or above this share of dense FLOPs, two attention calls take as long as one.
FEWEST_FRAMES = 4
HIGHEST_DENSITY = 0.9


@dataclass
class ForwardState:
    """One forward pass: where its video tokens stand, whether sparsity is on, and how its layers are counted.

    Attributes:
        layout: None where it is not known; ``reason`` then says why.
        reason: why it is off, where ``active`` is False.
        others: lengths of the sequences beside the video (text, audio) that have attention of their own.
        depth: the number of layers, None where the model says it itself.
        offsets: the first layer of each ``block_type``, where a model restarts ``block_index``.
        order: the layer of each self-attention call in turn, for models that give no ``block_index``; () = one a layer.
        padding: where the text's padding stands in the sequence, which a mask leaves out; empty where nothing is
            masked.
        step: sampling step, 0 = first; moves rotating reference frames.
        calls: self-attentions over the video so far.
        owner: the override that this is for, None = any. One that another node still calls leaves the attention alone;
            and its ``pattern_of`` tells a layer's pattern to those who must know it before the layer's attention is
            called.
    """

    layout: TokenLayout | None
    active: bool = True
    reason: str = "outside the step window"
    others: frozenset[int] = frozenset()
    depth: int | None = None
    offsets: Mapping[str, int] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    padding: range = range(0)
    step: int = 0
    calls: int = 0
    owner: Any = None

    def next_layer(self, options: Mapping[str, Any]) -> int | None:
        """The layer of this self-attention: given by the model, else counted. None beyond the last layer."""
        counted = self.calls
        self.calls += 1
        if "block_index" in options:
            return options["block_index"] + self.offsets.get(options.get("block_type", ""), 0)
        if self.order:
            return self.order[counted] if counted < len(self.order) else None
        return counted if self.depth is None or counted < self.depth else None

    def masks_padding_alone(self, layout: TokenLayout, mask: Tensor) -> bool:
        """Whether this is the mask of the text's padding: one row of keys for all queries."""
        return len(self.padding) > 0 and mask.numel() == mask.shape[-1] == layout.tokens

    def masks_a_part(self, k: Tensor, mask: Tensor | None, skip_reshape: bool) -> bool:
        """Whether a mask weighs all the tokens for a part of the queries: how LTX gives its guides another strength
        than 1."""
        return mask is not None and self.layout is not None and k.shape[2 if skip_reshape else 1] == self.layout.tokens

    def masked(self, mask: Tensor | None) -> range:
        """The tokens that a call with this mask leaves out."""
        return range(0) if mask is None else self.padding


@dataclass(frozen=True)
class DenseCall:
    """The attention that a call asked for: another node's override, or the backend that ComfyUI runs with."""

    func: Override
    previous: Override | None
    precision: Any
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Tells one dense attention from another where backends are measured against it."""
        parts = (self.previous, self.func) if self.previous else (self.func,)
        return " over ".join(getattr(part, "__name__", type(part).__name__) for part in parts)

    def call(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **form: bool) -> Tensor:
        """As asked for; ``form`` is skip_reshape and skip_output_reshape."""
        options = {"mask": mask, "attn_precision": self.precision, **form, **self.kwargs}
        return (
            self.func(q, k, v, heads, **options)
            if self.previous is None
            else self.previous(self.func, q, k, v, heads, **options)
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, Nq, D) over (B, H, Nk, D), as the backends ask for it."""
        return self.call(q, k, v, q.shape[1], None, skip_reshape=True, skip_output_reshape=True)


def make_attention_override(
    plan: TilePlan,
    report: AttentionReport,
    *,
    min_tokens: int = 0,
    previous: Override | None = None,
    placement: str = "strided",
    decline_slow: bool = False,
    backend: str = "auto",
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]``.

    Self-attention over the published token layout runs under the plan's pattern; everything else goes to ``previous``
    (another node's override) or to the backend untouched.

    Args:
        min_tokens: calls with fewer video tokens stay dense.
        placement: where the reference frames stand, one of ``tiles.PLACEMENTS``.
        decline_slow: patterns that would not be faster than dense, by rule or as measured, stay dense.
        backend: as of ``tile_attention``.
    """
    TilePattern(None).placed(placement)  # refuses an unknown one now, and not in the middle of a run

    # A plain closure: ComfyUI deep-copies model options, and functions survive that as they are.
    def override(
        func: Override,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        dense = DenseCall(func, previous, attn_precision, kwargs)
        form = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        options = kwargs.get("transformer_options") or {}
        state: ForwardState | None = options.get(FORWARD_KEY)
        if state is not None and state.owner not in (None, override):
            return dense.call(q, k, v, heads, mask, **form)
        layout = state.layout if state else None
        reason = why_not_the_video(state, q, k, mask, skip_reshape)
        if layout is not None and reason == ANOTHER_LENGTH:
            _warn_of_length(q.shape[2 if skip_reshape else 1], layout, report)
        if state is None or layout is None or reason:
            report.add_dense(reason)
            return dense.call(q, k, v, heads, mask, **form)
        layer = state.next_layer(options)
        pattern = _pattern(plan, layer, state, layout, options, report).placed(placement, state.step)
        reason = _why_dense(state, layer, layout, pattern, mask, min_tokens, decline_slow)
        if reason:
            report.add_dense(reason)
            with report.clock.taking(DENSE, q):
                return dense.call(q, k, v, heads, mask, **form)
        padding = state.masked(mask)
        real = without_padding(layout, padding)
        shaped = (x if skip_reshape else rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        kept_q, kept_k, kept_v = (leave_out(x, padding) for x in shaped)
        # Only dense calls hand on a scale of the model's own.
        able = backend if kwargs.get("scale") is None else "frames"
        chosen = _backend((kept_q, kept_k, kept_v), real, pattern, dense, able, decline_slow)
        if chosen == "dense":
            report.add_dense("measured faster")
            with report.clock.taking(DENSE, q):
                return dense.call(q, k, v, heads, mask, **form)
        density = pattern.flop_density(real.grid, real.prefix + real.suffix)
        report.add_sparse(density)
        with report.clock.taking(SPARSE, q, density):
            out = tile_attention(
                kept_q, kept_k, kept_v, real, pattern, dense=dense, backend=chosen, dense_name=dense.name
            )
        out = fill_in(out, padding)  # nothing reads what padding attends to
        return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")

    def pattern_of(state: ForwardState, layer: int) -> TilePattern:
        if state.layout is None:
            return TilePattern(None)
        pattern = _pattern(plan, layer, state, state.layout, {}, None).placed(placement, state.step)
        reason = _why_dense(state, layer, state.layout, pattern, None, min_tokens, decline_slow)
        return TilePattern(None) if reason else pattern

    override.pattern_of = pattern_of  # pyright: ignore[reportFunctionMemberAccess]
    return override


def _backend(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    pattern: TilePattern,
    dense: DenseCall,
    backend: str,
    decline_slow: bool,
) -> str:
    """The backend for this call: the one asked for, or the fastest; ``dense`` only where slow patterns are declined."""
    if backend != "auto":
        return backend
    return choose_backend(*qkv, layout, pattern, dense=dense, dense_name=dense.name, or_dense=decline_slow)


def why_not_the_video(state: ForwardState | None, q: Tensor, k: Tensor, mask: Tensor | None, skip_reshape: bool) -> str:
    """The reason why this is no self-attention over the video; an empty text where it is.

    q and k are (B, H, N, D) with ``skip_reshape``, else (B, N, H * D).
    """
    if state is None:
        return "no token grid"
    if k.shape != q.shape:
        return "masked" if state.masks_a_part(k, mask, skip_reshape) else "cross-attention"
    if state.layout is None:
        return state.reason
    tokens = q.shape[2 if skip_reshape else 1]
    if tokens == state.layout.tokens:
        return ""
    return "text or audio alone" if tokens in state.others else ANOTHER_LENGTH


def why_no_pattern(state: ForwardState, layout: TokenLayout, mask: Tensor | None) -> str:
    """The reason why no pattern goes over this self-attention over the video; an empty text where one can."""
    if layout.grid.t == 1:
        return "a single frame"
    if mask is not None and not state.masks_padding_alone(layout, mask):
        return "masked"
    return "" if state.active else state.reason


def _warn_of_length(tokens: int, layout: TokenLayout, report: AttentionReport) -> None:
    report.warn(
        ANOTHER_LENGTH,
        f"attention over {tokens} tokens stays dense: the video and the tokens beside it should be {layout.tokens} "
        f"({layout.prefix} + {layout.grid.t} frames of {layout.grid.tokens_per_frame} + {layout.suffix}). "
        "Another node may add or drop tokens.",
    )


def _pattern(
    plan: TilePlan,
    layer: int | None,
    state: ForwardState,
    layout: TokenLayout,
    options: Mapping[str, Any],
    report: AttentionReport | None,
) -> TilePattern:
    """The pattern of the layer that calls, for as many frames as the run has."""
    if layer is None:
        if report is not None:
            report.warn(
                "more calls than layers", "the model attends more often than it has layers: the rest stays dense."
            )
        return TilePattern(None)
    return pattern_for_frames(plan, layer, state.depth or options.get("total_blocks"), layout.grid.t, report)


def pattern_for_frames(
    plan: TilePlan, layer: int, depth: int | None, frames: int, report: AttentionReport | None
) -> TilePattern:
    """The plan's pattern of a layer for a run of ``frames`` latent frames; says once in a run that it is not the plan's
    own.

    ``report`` None says nothing: no run is under way, as in a forecast.
    """
    planned = plan.pattern(layer, depth)
    pattern = planned.scaled(plan.frames, frames)
    if report is None:
        return pattern
    if pattern.k is not None and pattern.k != planned.k:
        report.warn(
            "scaled",
            f"the plan was made for {plan.frames} latent frames and the run has {frames}: the distance between reference "
            f"frames is kept, so that there are fewer of them (layer {layer}: {pattern.k} instead of {planned.k}).",
        )
    elif planned.k is not None and planned.k > frames > 1:
        report.warn(
            "k above the frames",
            f"the plan has {planned.k} reference frames and the run {frames} latent frames: full attention.",
        )
    return pattern


def _why_dense(
    state: ForwardState,
    layer: int | None,
    layout: TokenLayout,
    pattern: TilePattern,
    mask: Tensor | None,
    min_tokens: int,
    decline_slow: bool,
) -> str:
    """The reason why a self-attention over the video stays dense; an empty text where it becomes sparse."""
    reason = why_no_pattern(state, layout, mask)
    if reason:
        return reason
    if layer is None:
        return "more calls than layers"
    if layout.grid.tokens < min_tokens:
        return "below min_tokens"
    if pattern.is_full(layout.grid.t):
        return "full in the plan"
    if decline_slow and layout.grid.t < FEWEST_FRAMES:
        return "too few frames to pay"
    if decline_slow and pattern.flop_density(layout.grid, layout.prefix + layout.suffix) > HIGHEST_DENSITY:
        return "too dense to pay"
    return ""
