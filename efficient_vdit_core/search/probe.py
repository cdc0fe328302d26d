"""Measures, inside a running dense model, what each candidate pattern would do to each layer's attention.

Speaks ComfyUI's attention-override protocol, as ``attention.hook.override`` does, and returns the dense result: the run goes
on undisturbed. Only attention is computed again, one candidate after another, so memory is that of a dense run and
one attention output.

What is measured, for each self-attention call and each candidate pattern p:
- the attention error ||A_p - A|| / ||A||: A is the dense output before the output projection, over batch, heads and
  tokens, and A_p the candidate's on the same live q, k, v; the inputs are those of the dense run, so errors of earlier
  layers do not add up. In the same pass the part of each head h in it, ||A_p,h - A_h||^2 / ||A||^2.
- with ``blocks.replay_blocks``, the block error ||B_p - B|| / ||B||: B is what the whole block returns, residual and
  feed-forward included.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..attention import TokenLayout, choose_backend, simplest_backend, tile_attention
from ..attention.backends.head_calls import MANY_PATTERNS
from ..attention.backends.spans import put, take
from ..attention.call_shape import CallShape
from ..attention.dense_call import DenseCall, Override
from ..attention.hook.attention_call import AttentionCall, override_by
from ..attention.hook.state import CallPlace
from ..attention.layout import spans_of
from ..tiles import TilePattern
from ..timing import wait_for
from .calls import layout_of_call, place_of_call

ATTENTION, BLOCK, OUTPUT = "attention", "block", "output"
MEASURES = (ATTENTION, BLOCK, OUTPUT)
DENSE = None  # the key of dense attention's seconds
Out = TypeVar("Out")
Compare = Callable[[Tensor, Tensor], tuple[float, np.ndarray]]  # approximate and exact -> as `relative_errors`


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

    def holds(self, layer: int | None) -> bool:
        """Whether a call of ``layer`` follows the pattern."""
        return self.layer is None or self.layer == layer


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


def make_probe_override(
    record: ProbeRecord,
    *,
    progress: Callable[[int], None] | None = None,
    begun: Callable[[TokenLayout], None] | None = None,
    previous: Override | None = None,
    compare: Compare | None = None,
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]`` that measures into ``record``.

    ``begun`` is told before the first call is measured where the video stands, and ``progress`` the layer after each call over
    the video; what they raise ends the run, and nothing is left behind. ``previous``: another node's override, asked for every
    dense piece. ``compare``: in place of `relative_errors`.
    """
    compare = compare or relative_errors

    def answer(call: AttentionCall) -> Tensor:
        state, (layout, reason) = call.state, layout_of_call(call)
        replay, place, dense = record.replaying, None, call.asked
        if layout is not None and (replay is None or replay.layer is not None):
            place, reason = place_of_call(call)
        if state is None or layout is None or reason:
            if replay is None:
                record.add_dense(reason)
            return call.dense()
        padding = state.masked(call.mask)
        if replay is not None:
            if not replay.holds(place and place.layer) or replay.pattern.is_full(layout.grid.t):
                return call.dense()
            out = tile_attention(
                *call.take(padding), layout, replay.pattern, dense=dense, backend=_exact(replay.pattern)
            )
            return call.give(out, padding)
        assert place is not None
        if record.layout is None and begun is not None:
            begun(layout)
        if record.takes(place, layout):
            out = measure(call, place, layout, padding)
        else:
            out = call.dense()
        if progress is not None:
            progress(place.layer)
        return out

    def measure(call: AttentionCall, place: CallPlace, layout: TokenLayout, padding: range) -> Tensor:
        layer, dense = place.layer, call.asked
        out = _timed(record, layer, DENSE, "dense", call.query, call.dense)
        exact, qkv = call.given(out, padding), call.take(padding)
        _time_part(record, layer, DENSE, "dense", qkv, dense)
        for pattern in record.candidates:
            error, of_heads = _candidate_errors(record, layer, pattern, qkv, exact, layout, dense, compare)
            record.compared(ATTENTION, layer, pattern, error, exact)
            record.add_heads(layer, pattern, place.first_head, of_heads)
        return out

    return override_by(answer, previous)


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """||approximate - exact|| / ||exact|| over all elements of (B, H, ...); inf where anything is not finite."""
    return relative_errors(approximate, exact)[0]


def relative_errors(approximate: Tensor, exact: Tensor) -> tuple[float, np.ndarray]:
    """As ``relative_error``, and the square of each head's part in it (H,); they sum to the square of the first."""
    differences, total = squared_errors(approximate, exact)
    wrong, norm = float(sum(differences)), float(total)
    of_heads = torch.stack(differences).double().cpu().numpy()
    if not (math.isfinite(wrong) and math.isfinite(norm)):
        return math.inf, np.full(len(of_heads), math.inf)
    if not norm:
        return (math.inf if wrong else 0.0), np.where(of_heads > 0, math.inf, 0.0)
    return math.sqrt(max(wrong, 0.0)) / norm**0.5, of_heads / norm


def flat(output: Any) -> Tensor:
    """The tensors of a module's output as one of shape (1, 1, n)."""
    tensors = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
    return torch.cat([t.flatten() for t in tensors])[None, None]


def squared_errors(approximate: Tensor, exact: Tensor) -> tuple[list[Tensor], Tensor]:
    """||approximate - exact||^2 of each head of (B, H, ...), and ||exact||^2 of all."""
    differences, total = [], torch.zeros((), dtype=torch.float32, device=exact.device)
    # A head at a time: the float32 copies stay small.
    for a, e in zip(approximate.unbind(1), exact.unbind(1), strict=True):
        differences.append((a.float() - e.float()).square().sum())
        total = total + e.float().square().sum()
    return differences, total


def _candidate_errors(
    record: ProbeRecord,
    layer: int,
    pattern: TilePattern,
    qkv: Sequence[Tensor],
    exact: Tensor,
    layout: TokenLayout,
    dense: DenseCall,
    compare: Compare,
) -> tuple[float, np.ndarray]:
    if pattern.is_full(layout.grid.t):
        return 0.0, np.zeros(exact.shape[1])
    q, k, v = qkv
    approximate = tile_attention(q, k, v, layout, pattern, dense=dense, backend=_exact(pattern))
    if record.timed:
        _time_candidate(record, layer, pattern, qkv, layout, dense)
    return compare(approximate, exact)


def _exact(pattern: TilePattern) -> str:
    """Errors are those of the pattern, so its tiles are computed even where dense attention would be faster, and always by
    the same backend: the same run gives the same plan."""
    return simplest_backend(pattern)


def _time_candidate(
    record: ProbeRecord,
    layer: int,
    pattern: TilePattern,
    qkv: Sequence[Tensor],
    layout: TokenLayout,
    dense: DenseCall,
) -> None:
    """Takes the time of the backend that a run would choose; where that is dense attention, dense attention's time."""
    backend = choose_backend(CallShape.of(qkv[0]), layout, pattern, dense=dense)
    if backend == "dense":
        record.add_seconds(layer, pattern, record.seconds[layer, DENSE][-1])
        return
    attend = partial(tile_attention, layout=layout, pattern=pattern, dense=dense, backend=backend)
    _timed(record, layer, pattern, backend, qkv[0], lambda: attend(*qkv))
    if backend not in MANY_PATTERNS:  # these take all groups in one call
        _time_part(record, layer, pattern, backend, qkv, attend)


def _time_part(
    record: ProbeRecord,
    layer: int,
    pattern: TilePattern | None,
    backend: str,
    qkv: Sequence[Tensor],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Takes the time of every second head, gathered and put back as a group that stands apart is."""
    heads = spans_of(range(0, qkv[0].shape[1], 2))
    share = len(heads) / qkv[0].shape[1]
    if not (record.timed and record.by_head) or share == 1:
        return
    out = torch.empty_like(qkv[0])

    def attend_a_part() -> None:
        q, k, v = (take(x, heads, 1) for x in qkv)
        put(out, heads, attend(q, k, v), 1)

    _, seconds = _by_the_clock(record, ("part", backend, pattern, out.shape, out.dtype), out.device, attend_a_part)
    record.add_part(layer, pattern, share, seconds)


def _timed(
    record: ProbeRecord,
    layer: int,
    pattern: TilePattern | None,
    backend: str,
    like: Tensor,
    run: Callable[[], Tensor],
) -> Tensor:
    if not record.timed:
        return run()
    out, seconds = _by_the_clock(record, (backend, pattern, like.shape, like.dtype), like.device, run)
    record.add_seconds(layer, pattern, seconds)
    return out


def _by_the_clock(
    record: ProbeRecord, kind: Hashable, device: torch.device, run: Callable[[], Out]
) -> tuple[Out, float]:
    """What ``run`` gives, and its seconds. The first of a kind is made once before, as it may have to compile: its layer would
    pay for all of them."""
    if kind not in record.ran:
        run()
        record.ran.add(kind)
    wait_for(device)
    start = time.perf_counter()
    out = run()
    wait_for(device)
    return out, time.perf_counter() - start
