"""Measures, inside a running dense model, what each candidate pattern would do to each layer's attention.

Speaks ComfyUI's attention-override protocol, as ``attention.override`` does, and returns the dense result: the run goes
on undisturbed. Only attention is computed again, one candidate after another, so memory is that of a dense run and
one attention output.

What is measured, for each self-attention call and each candidate of k reference frames:
- the attention error ||A_k - A|| / ||A||: A is the dense output before the output projection, over batch, heads and
  tokens, and A_k the candidate's on the same live q, k, v; the inputs are those of the dense run, so errors of earlier
  layers do not add up.
- with ``blocks.replay_blocks``, the block error ||B_k - B|| / ||B||: B is what the whole block returns, residual and
  feed-forward included.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..attention import TokenLayout, choose_backend, tile_attention
from ..attention.choose import CallShape, wait_for
from ..attention.dense_call import DenseCall
from ..attention.padding import as_heads, fill_in
from ..attention.state import FORWARD_KEY, ForwardState, Override
from ..tiles import TilePattern
from .calls import layer_of_call, layout_of_call

ATTENTION, BLOCK = "attention", "block"
MEASURES = (ATTENTION, BLOCK)
DENSE = None  # the key of dense attention's seconds
# Errors are those of the pattern, so its tiles are computed even where dense attention would be faster, and always by
# the same backend: the same run gives the same plan.
EXACT = "frames"


@dataclass
class ProbeRecord:
    """What a probing run found: (layer, k) -> one value for each call. Safe to fill from several threads.

    ``timed``: also take the time of each attention call, which makes the run wait for the device.
    """

    candidates: tuple[int, ...]
    timed: bool = False
    layout: TokenLayout | None = None
    errors: dict[str, dict[tuple[int, int], list[float]]] = field(
        default_factory=lambda: {m: defaultdict(list) for m in MEASURES}
    )
    seconds: dict[tuple[int, int | None], list[float]] = field(default_factory=lambda: defaultdict(list))
    dense: Counter[str] = field(default_factory=Counter)
    replaying: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def error(self, layer: int, k: int, measure: str = ATTENTION) -> float:
        """Mean error of a layer over its calls; inf where one was not finite, NaN where there was none."""
        found = self.errors[measure].get((layer, k))
        return sum(found) / len(found) if found else math.nan

    def cost(self, layer: int, k: int) -> float:
        """Time of the candidate as a share of the layer's dense time, both at their fastest call."""
        return min(self.seconds[layer, k]) / min(self.seconds[layer, DENSE])

    def add(self, measure: str, layer: int, k: int, error: float) -> None:
        with self.lock:
            self.errors[measure][layer, k].append(error)

    def add_seconds(self, layer: int, k: int | None, seconds: float) -> None:
        with self.lock:
            self.seconds[layer, k].append(seconds)

    def add_dense(self, reason: str) -> None:
        with self.lock:
            self.dense[reason] += 1


def make_probe_override(
    record: ProbeRecord, *, progress: Callable[[int], None] | None = None, previous: Override | None = None
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]`` that measures into ``record``.

    ``progress`` is told the layer after each measured call; what it raises ends the run, and nothing is left behind.
    ``previous``: another node's override, asked for every dense piece.
    """

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
        layout, reason = layout_of_call(state, q, k, mask, skip_reshape)
        replaying, layer = record.replaying, None
        if layout is not None and replaying is None:
            layer, reason = layer_of_call(state, options, heads)
        if state is None or layout is None or reason:
            if replaying is None:
                record.add_dense(reason)
            return dense.call(q, k, v, heads, mask, **form)
        padding = state.masked(mask)
        qh, kh, vh = (as_heads(x, heads, skip_reshape, padding) for x in (q, k, v))
        if layer is None:
            out = tile_attention(qh, kh, vh, layout, TilePattern(replaying), dense=dense, backend=EXACT)
            out = fill_in(out, padding)
            return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")
        record.layout = record.layout or layout
        out = _timed(record, layer, DENSE, q, lambda: dense.call(q, k, v, heads, mask, **form))
        exact = as_heads(out, heads, skip_output_reshape, padding)
        for count in record.candidates:
            record.add(
                ATTENTION, layer, count, _candidate_error(record, layer, count, (qh, kh, vh), exact, layout, dense)
            )
        if progress is not None:
            progress(layer)
        return out

    return override


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """||approximate - exact|| / ||exact|| over all elements of (B, H, ...); inf where anything is not finite."""
    difference, total = torch.zeros(2, dtype=torch.float32, device=exact.device)
    for a, e in zip(
        approximate.unbind(1), exact.unbind(1), strict=True
    ):  # a head at a time: the float32 copies stay small
        difference = difference + (a.float() - e.float()).square().sum()
        total = total + e.float().square().sum()
    wrong, norm = (
        math.sqrt(max(float(difference), 0.0)) if bool(difference.isfinite()) else math.inf,
        float(total) ** 0.5,
    )
    if not (math.isfinite(wrong) and math.isfinite(norm)):
        return math.inf
    return wrong / norm if norm else (math.inf if wrong else 0.0)


def _candidate_error(
    record: ProbeRecord,
    layer: int,
    count: int,
    qkv: Sequence[Tensor],
    exact: Tensor,
    layout: TokenLayout,
    dense: DenseCall,
) -> float:
    pattern = TilePattern(count)
    if pattern.is_full(layout.grid.t):
        return 0.0
    q, k, v = qkv
    approximate = tile_attention(q, k, v, layout, pattern, dense=dense, backend=EXACT)
    if record.timed:
        _time_candidate(record, layer, count, qkv, layout, dense)
    return relative_error(approximate, exact)


def _time_candidate(
    record: ProbeRecord, layer: int, count: int, qkv: Sequence[Tensor], layout: TokenLayout, dense: DenseCall
) -> None:
    """Takes the time of the backend that a run would choose; where that is dense attention, dense attention's time."""
    q, k, v = qkv
    pattern = TilePattern(count)
    backend = choose_backend(CallShape.of(q), layout, pattern, dense=dense, dense_name=dense.name)
    if backend == "dense":
        record.add_seconds(layer, count, record.seconds[layer, DENSE][-1])
    else:
        _timed(record, layer, count, q, lambda: tile_attention(q, k, v, layout, pattern, dense=dense, backend=backend))


def _timed(record: ProbeRecord, layer: int, k: int | None, like: Tensor, run: Callable[[], Tensor]) -> Tensor:
    if not record.timed:
        return run()
    wait_for(like.device)
    start = time.perf_counter()
    out = run()
    wait_for(like.device)
    record.add_seconds(layer, k, time.perf_counter() - start)
    return out
