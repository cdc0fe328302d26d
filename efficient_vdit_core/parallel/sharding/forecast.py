"""A model of the speed-up on hardware that is not here: arithmetic and bytes, each at a stated rate.

A layer's time on P devices is its FLOPs / (P * rate) plus the bytes that a rank sends / link rate; what the runs on
this machine took beyond that is the factor ``overhead``. That is with nothing ``overlapped``, the bound from below; with
it, exchanges run beside the attention as ``timeline`` tells. Weights that are shared out come while a block computes:
the longer of the two counts either way.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...attention import TokenLayout
from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from .layout import Shard, choose_shard
from .timeline import RbWork, rb_seconds, ulysses_seconds
from .traffic import rb_bytes, rb_exchanges, scheme_of, ulysses_bytes, ulysses_exchanges


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of one device, and bytes a second that a device sends."""

    name: str
    flops: float
    link: float


# Stated, not measured here: dense bf16 rates that transformers reach, and link rates as collectives see them.
GPU_RATES = (
    Rates("NVLink, 400 TFLOP/s and 300 GB/s", 400e12, 300e9),
    Rates("PCIe 4 with peer access, 130 TFLOP/s and 20 GB/s", 130e12, 20e9),
    Rates("PCIe 4 without peer access, 130 TFLOP/s and 8 GB/s", 130e12, 8e9),
)


_FINE = 16


@dataclass(frozen=True)
class LayerShape:
    """A block over the tokens of ``layout``, batch 1.

    ``weights``: elements of the matrices that every token meets, default Open-Sora-Plan's 14 width^2 with width = heads
    x head_dim. ``text``: tokens that are crossed with.
    """

    layout: TokenLayout
    heads: int
    head_dim: int
    itemsize: int = 2
    text: int = 300
    weights: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def flops(self, pattern: LayerPattern) -> float:
        """Self-attention, cross-attention and feed-forward of one block: 2 N weights in matrices, 4 N^2 width density
        in attention."""
        tokens = self.layout.tokens
        matrices = 2.0 * tokens * (self.weights or 14 * self.width**2) + 4.0 * self.text * self.width**2
        return matrices + self.attention_flops(pattern) + 4.0 * tokens * self.width * self.text

    def attention_flops(self, pattern: LayerPattern) -> float:
        """Self-attention alone."""
        tokens, grid = self.layout.tokens, self.layout.grid
        return 4.0 * tokens**2 * self.width * pattern.flop_density(grid, tokens - grid.tokens)


def bytes_sent(
    shape: LayerShape, pattern: LayerPattern, ranks: int, scheme: str, shard: Shard | None = None
) -> tuple[str, int]:
    """The scheme that ``scheme`` means here, and the most bytes that a rank sends in one layer by it. ``shard``: that of the
    forward, whose layers share one; by default that of layers that are all alike."""
    shard = shard or choose_shard(shape.layout, ranks, [pattern])
    about = (shape.heads, shape.head_dim, shape.itemsize)
    scheme = scheme_of(scheme, shard, pattern, *about)
    if scheme == "rb":
        return scheme, max(rb_bytes(shard, pattern.kinds[0], *about))
    return scheme, max(ulysses_bytes(shard, *about))


def weights_of(devices: Sequence[str], rates: Sequence[float]) -> tuple[int, ...]:
    """The shares of devices by their names, in sixteenths of the fastest kind's, from FLOPs a second that each reached;
    () where they are alike."""
    by_kind = _means_by_name(devices, rates)
    found = tuple(max(1, round(_FINE * rate / max(by_kind))) for rate in by_kind)
    return () if len(set(found)) == 1 else found


def rates_of(devices: Sequence[str], rates: Sequence[float]) -> tuple[float, ...]:
    """FLOPs a second to count on: of unlike devices the mean of each kind, for they get shares by it; of like ones the
    slowest's, for which the others wait."""
    return _means_by_name(devices, rates) if weights_of(devices, rates) else (min(rates),) * len(devices)


def _means_by_name(devices: Sequence[str], rates: Sequence[float]) -> tuple[float, ...]:
    """The rates of devices of one name differ by chance alone."""
    kinds = {name: statistics.mean(r for n, r in zip(devices, rates, strict=True) if n == name) for name in devices}
    return tuple(kinds[name] for name in devices)


def layer_seconds(
    shape: LayerShape,
    pattern: LayerPattern,
    ranks: int,
    scheme: str,
    rates: Rates,
    *,
    overhead: float = 1.0,
    overlapped: bool = False,
    shard: Shard | None = None,
) -> float:
    """Time of a block on ``ranks``; ``overhead`` multiplies the arithmetic (imbalance, slicing, merging). ``shard``: as in
    `bytes_sent`."""
    arithmetic = overhead / ranks / rates.flops
    everything = shape.flops(pattern) * arithmetic
    if not overlapped:
        return everything + bytes_sent(shape, pattern, ranks, scheme, shard)[1] / rates.link
    attention = shape.attention_flops(pattern) * arithmetic
    shard = shard or choose_shard(shape.layout, ranks, [pattern])
    about = (shape.heads, shape.head_dim, shape.itemsize)
    if scheme_of(scheme, shard, pattern, *about) == "rb":
        work = _rb_work(shape, pattern.kinds[0], attention, arithmetic)
        beside = max(rb_seconds(work, sent, rates.link) for sent in rb_exchanges(shard, pattern.kinds[0], *about))
    else:
        beside = max(ulysses_seconds(attention, *sent, rates.link) for sent in ulysses_exchanges(shard, *about))
    return everything - attention + beside


def _rb_work(shape: LayerShape, pattern: TilePattern, attention: float, arithmetic: float) -> RbWork:
    """A rank's even part of the attention, cut where RB cuts it."""
    size, tokens = shape.layout.grid.tokens_per_frame, shape.layout.tokens
    shared = tokens - (shape.layout.grid.t - len(pattern.reference_frames(shape.layout.grid.t))) * size
    rows = 4.0 * shared * tokens * shape.width * arithmetic
    to_shared = 4.0 * (tokens - shared) * shared * shape.width * arithmetic
    return RbWork(max(0.0, attention - rows - to_shared), rows, to_shared)


def forward_seconds(
    shape: LayerShape,
    patterns: Iterable[LayerPattern],
    ranks: int,
    scheme: str,
    rates: Rates,
    *,
    gathered: int = 0,
    batch: int = 1,
    overlapped: bool = False,
) -> float:
    """Time of a forward over a ``batch`` whose layers have ``patterns``; embeddings and the gather after the last layer
    are left out. ``gathered``: the bytes of weights that a rank gathers in it."""
    counts = Counter(patterns)
    shard = choose_shard(shape.layout, ranks, counts.elements())
    computing = batch * sum(count * shape.flops(pattern) for pattern, count in counts.items()) / ranks / rates.flops
    layers = batch * sum(
        count * layer_seconds(shape, pattern, ranks, scheme, rates, overlapped=overlapped, shard=shard)
        for pattern, count in counts.items()
    )
    return layers + max(0.0, gathered / rates.link - computing)


def forward_speedup(
    shape: LayerShape,
    patterns: Sequence[LayerPattern],
    ranks: int,
    scheme: str,
    rates: Rates,
    gathered: int = 0,
    *,
    overlapped: bool = False,
) -> float:
    """Time of a forward on one device over that on ``ranks``, as of ``forward_seconds``."""
    alone = forward_seconds(shape, patterns, 1, scheme, rates)
    return alone / forward_seconds(shape, patterns, ranks, scheme, rates, gathered=gathered, overlapped=overlapped)


def speedup(
    shape: LayerShape, pattern: LayerPattern, ranks: int, scheme: str, rates: Rates, overhead: float = 1.0
) -> float:
    """Time of a block on one device over time on ``ranks``, with nothing overlapped."""
    alone = shape.flops(pattern) / rates.flops
    return alone / layer_seconds(shape, pattern, ranks, scheme, rates, overhead=overhead)


def overhead(seconds: float, alone: float, ranks: int, sent: int, link: float) -> float:
    """The factor that makes the model give the measured ``seconds`` on ``ranks`` where one took ``alone``; at least
    1."""
    return max(1.0, (seconds - sent / link) * ranks / alone)
