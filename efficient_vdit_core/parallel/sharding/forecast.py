"""A model of the speed-up on hardware that is not here: arithmetic and bytes, each at a stated rate, no overlap
assumed but that of gathered weights.

A layer's time on P devices is its FLOPs / (P * rate) plus the bytes that a rank sends / link rate; what the runs on
this machine took beyond that is the factor ``overhead``. Weights that are shared out come while a block computes: the
longer of the two counts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...attention import TokenLayout
from ...head_patterns import LayerPattern
from .layout import choose_shard
from .traffic import rb_bytes, scheme_of, ulysses_bytes


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
        tokens, grid = self.layout.tokens, self.layout.grid
        matrices = 2.0 * tokens * (self.weights or 14 * self.width**2) + 4.0 * self.text * self.width**2
        density = pattern.flop_density(grid, tokens - grid.tokens)
        return matrices + 4.0 * tokens * self.width * (tokens * density + self.text)


def bytes_sent(shape: LayerShape, pattern: LayerPattern, ranks: int, scheme: str) -> tuple[str, int]:
    """The scheme that ``scheme`` means here, and the most bytes that a rank sends in one layer by it."""
    shard = choose_shard(shape.layout, ranks, [pattern])
    about = (shape.heads, shape.head_dim, shape.itemsize)
    scheme = scheme_of(scheme, shard, pattern, *about)
    if scheme == "rb":
        return scheme, max(rb_bytes(shard, pattern.kinds[0], *about))
    return scheme, max(ulysses_bytes(shard, *about))


def weights_of(devices: Sequence[str], rates: Sequence[float]) -> tuple[int, ...]:
    """The shares of devices by their names, in sixteenths of the fastest kind's, from FLOPs a second that each reached;
    () where they are alike. The rates of devices of one name differ by chance alone."""
    kinds = {name: statistics.mean(r for n, r in zip(devices, rates, strict=True) if n == name) for name in devices}
    found = tuple(max(1, round(_FINE * kinds[name] / max(kinds.values()))) for name in devices)
    return () if len(set(found)) == 1 else found


def forward_speedup(
    shape: LayerShape, patterns: Iterable[LayerPattern], ranks: int, scheme: str, rates: Rates, gathered: int = 0
) -> float:
    """The same for a whole forward whose layers have ``patterns``; embeddings and the gather after the last layer are
    left out. ``gathered``: the bytes of weights that a rank gathers in it."""
    counts = Counter(patterns)
    alone = sum(count * shape.flops(pattern) for pattern, count in counts.items()) / rates.flops
    sent = sum(count * bytes_sent(shape, pattern, ranks, scheme)[1] for pattern, count in counts.items()) / rates.link
    return alone / (max(alone / ranks, gathered / rates.link) + sent)


def speedup(
    shape: LayerShape, pattern: LayerPattern, ranks: int, scheme: str, rates: Rates, overhead: float = 1.0
) -> float:
    """Time on one device over time on ``ranks``; ``overhead`` multiplies the latter's arithmetic (imbalance, slicing,
    merging)."""
    alone = shape.flops(pattern) / rates.flops
    return alone / (overhead * alone / ranks + bytes_sent(shape, pattern, ranks, scheme)[1] / rates.link)


def overhead(seconds: float, alone: float, ranks: int, sent: int, link: float) -> float:
    """The factor that makes the model give the measured ``seconds`` on ``ranks`` where one took ``alone``; at least
    1."""
    return max(1.0, (seconds - sent / link) * ranks / alone)
