"""Decides call by call whether a model's attention becomes sparse, and counts what it decided and why.

Speaks ComfyUI's attention-override protocol without importing ComfyUI, so that the same function serves the native
models there and the engine's own pipeline. All state of one forward pass lives in its ``transformer_options``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

from ..plan import TilePlan
from ..tiles import TilePattern
from .dispatch import tile_attention
from .layout import TokenLayout

FORWARD_KEY = "evdit"

Override = Callable[..., Tensor]


@dataclass
class ForwardState:
    """One forward pass: where its video tokens stand, whether sparsity is on, and how many self-attentions passed.

    ``reason`` says why it is off where ``active`` is False. ``plan`` and ``min_tokens`` are what the override follows, for
    those who must know a layer's pattern before its attention is called.
    """

    layout: TokenLayout
    active: bool = True
    reason: str = "outside the step window"
    calls: int = 0
    plan: TilePlan | None = None
    min_tokens: int = 0

    def pattern(self, layer: int, layers: int) -> TilePattern:
        """The pattern of layer ``layer`` of ``layers`` in this forward pass."""
        if self.plan is None or not self.active or self.layout.tokens < self.min_tokens:
            return TilePattern(None)
        return self.plan.pattern(layer, layers)


@dataclass
class AttentionReport:
    """Counts of a run, safe to fill from several threads."""

    sparse: int = 0
    density_sum: float = 0.0
    dense: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_sparse(self, density: float) -> None:
        with self.lock:
            self.sparse += 1
            self.density_sum += density

    def add_dense(self, reason: str) -> None:
        with self.lock:
            self.dense[reason] += 1

    def reset(self) -> None:
        with self.lock:
            self.sparse, self.density_sum = 0, 0.0
            self.dense.clear()

    def summary(self) -> str:
        """One line: how many calls became sparse, at what mean density, and why the others stayed dense."""
        with self.lock:
            kept = f" at mean density {self.density_sum / self.sparse:.2f}" if self.sparse else ""
            why = ", ".join(f"{count} {reason}" for reason, count in self.dense.most_common())
            return f"{self.sparse} attention calls sparse{kept}; dense: {why or 'none'}"


def make_attention_override(
    plan: TilePlan, report: AttentionReport, *, min_tokens: int = 0, previous: Override | None = None
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]``.

    Self-attention over the published token layout runs under the plan's pattern; everything else goes to ``previous``
    (another node's override) or to the backend untouched. ``min_tokens``: shorter sequences stay dense.
    """

    # A plain closure: ComfyUI deep-copies model options, and functions survive that as they are.
    def override(func: Override, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                 attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any) -> Tensor:
        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flat: bool, flat_out: bool) -> Tensor:
            shape = {"skip_reshape": not flat, "skip_output_reshape": not flat_out}
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, attn_precision=attn_precision, **shape, **kwargs)
            return func(q, k, v, heads, mask=mask, attn_precision=attn_precision, **shape, **kwargs)

        options = kwargs.get("transformer_options") or {}
        state: ForwardState | None = options.get(FORWARD_KEY)
        reason = _why_dense(state, q, k, mask, skip_reshape, min_tokens)
        if state is None or reason:
            report.add_dense(reason or "no token grid")
            return dense(q, k, v, mask, not skip_reshape, not skip_output_reshape)
        frames = state.layout.grid.t
        pattern = plan.pattern(_layer(state, options), options.get("total_blocks"))
        if pattern.is_full(frames):
            report.add_dense("full in the plan")
            return dense(q, k, v, mask, not skip_reshape, not skip_output_reshape)
        report.add_sparse(pattern.density(frames))
        if not skip_reshape:
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        out = tile_attention(q, k, v, state.layout, pattern, dense=lambda q, k, v: dense(q, k, v, None, False, False))
        return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")

    return override


def _why_dense(state: ForwardState | None, q: Tensor, k: Tensor, mask: Tensor | None, skip_reshape: bool, min_tokens: int) -> str:
    """The reason why this call stays dense, or an empty text where it may become sparse."""
    tokens = q.shape[2] if skip_reshape else q.shape[1]
    if state is None:
        return "no token grid"
    if k.shape != q.shape:
        return "cross-attention"
    if tokens != state.layout.tokens:
        return "another sequence length"
    if state.layout.grid.t == 1:
        return "a single frame"
    if mask is not None:
        return "masked"
    if not state.active:
        return state.reason
    return "below min_tokens" if tokens < min_tokens else ""


def _layer(state: ForwardState, options: dict[str, Any]) -> int:
    """The layer's index: given by the model, else counted over this forward pass's self-attentions."""
    counted = state.calls
    state.calls += 1
    return options.get("block_index", counted)
