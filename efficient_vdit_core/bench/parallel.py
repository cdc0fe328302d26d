"""Times a forward on several ranks of this machine against one, by both schemes, with whole weights and with shared out
ones, and carries the result to GPUs by a model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..attention import TokenLayout
from ..parallel.pool.imports import Host
from ..parallel.pool.session import Launch, Session
from ..parallel.sharding.forecast import GPU_RATES, LayerShape, bytes_sent, overhead, speedup
from ..tiles import TilePattern, TokenGrid
from .minimax_h3 import CLIPS, HEAD_DIM, HEADS
from .paper import PARALLEL_SPEEDUP

HOST = Host("", "bench.parallel_host", "BenchHost")
TIMEOUT = 3600.0
# The model's cases: the paper's two clip lengths at 720p.
PAPER_GRIDS = {29: TokenGrid(8, 45, 80), 93: TokenGrid(24, 45, 80)}


@dataclass(frozen=True)
class ParallelShape:
    """Blocks of Open-Sora-Plan's form over ``grid``; ``heads`` x ``head_dim`` is the width. ``ks``: patterns to
    time."""

    grid: TokenGrid
    depth: int
    ks: tuple[int | None, ...]
    heads: int = 24
    head_dim: int = 96

    def layer(self, itemsize: int) -> LayerShape:
        return LayerShape(TokenLayout(self.grid), self.heads, self.head_dim, itemsize)


def h3_shape(depth: int) -> ParallelShape:
    """MiniMax-H3's heads and its video of 10 s, under as many reference frames as its presets have (strides 10 and 5). The text
    and the sound before the video, a twentieth of the sequence, are left out, and the width is that of all heads."""
    clip = CLIPS["1344x768-10s"]
    ks = (None, -(-clip.frames // 10), -(-clip.frames // 5))
    return ParallelShape(clip.layout.grid, depth, ks, HEADS, HEAD_DIM)


@dataclass(frozen=True)
class Way:
    """One way to compute a forward: ``k`` reference frames, None = full; ``scheme`` "alone" is one rank; ``weights`` as
    in Sequence Parallel."""

    k: int | None
    scheme: str
    weights: str = "whole"


def ways(ks: Sequence[int | None]) -> list[Way]:
    """What is timed of each pattern: a rank alone, each scheme, and shared out weights by the first of them."""
    found = []
    for k in ks:
        schemes = ("ulysses",) if k is None else ("rb", "ulysses")
        found += [Way(k, "alone"), *(Way(k, scheme) for scheme in schemes), Way(k, schemes[0], "sharded")]
    return found


def measure(
    shape: ParallelShape, ranks: int, devices: tuple[str, ...], *, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Rows for one rank alone and for ``ranks``, by each scheme and pattern, with whole weights and with shared out ones,
    in turns within each repeat; medians.

    Raises RuntimeError where the sharded result is not the single rank's, or shared out weights give other bits.
    """
    config = {"num_layers": shape.depth, "num_attention_heads": shape.heads, "attention_head_dim": shape.head_dim}
    grid = [shape.grid.t, shape.grid.h, shape.grid.w]
    launch = Launch(devices, "bench", {"config": config, "grid": grid, "seed": seed}, TIMEOUT, TIMEOUT, HOST)
    times: dict[Way, list[float]] = {way: [] for way in ways(shape.ks)}
    said: dict[Way, dict[str, Any]] = {}
    session = Session()
    try:
        for turn in range(repeats + 1):
            for way in times:
                answers, tensors = session.step(launch, asdict(way), {})
                if turn:  # the first one warms up, and is compared
                    times[way].append(max(answer["seconds"] for answer in answers))
                else:
                    most = {name: max(a[name] for a in answers) for name in ("bytes", "gathered", "held")}
                    said[way] = {**most, "out": tensors["out"]}
                    _check(way, said)
        link = min(test["gigabytes_per_second"] for test in session.tests) * 1e9
    finally:
        session.stop()
    item = 4 if devices[0] == "cpu" else 2
    return [_row(shape, ranks, way, times, said[way], link, item) for way in times]


def _check(way: Way, said: dict[Way, dict[str, Any]]) -> None:
    got, want = said[way]["out"], said[Way(way.k, "alone")]["out"]
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not error < (1e-3 if got.dtype == torch.float32 else 0.1):
        raise RuntimeError(
            f"The sharded forward differs from one rank's by {error:.2g} of its largest value; its timings mean nothing."
        )
    if way.weights == "sharded" and not torch.equal(got, said[Way(way.k, way.scheme)]["out"]):
        raise RuntimeError("Shared out weights gave other bits than whole ones; their timings mean nothing.")


def _row(
    shape: ParallelShape,
    ranks: int,
    way: Way,
    times: dict[Way, list[float]],
    said: dict[str, Any],
    link: float,
    item: int,
) -> dict[str, Any]:
    pattern, layer, sent = TilePattern(way.k), shape.layer(item), said["bytes"] // shape.depth
    seconds, alone = statistics.median(times[way]), statistics.median(times[Way(way.k, "alone")])
    count = 1 if way.scheme == "alone" else ranks
    row = {
        "kind": "measured",
        "ranks": count,
        "frames": shape.grid.t,
        "tokens_per_frame": shape.grid.tokens_per_frame,
        "depth": shape.depth,
        "pattern": pattern.name(shape.grid.t),
        "scheme": way.scheme,
        "weights": way.weights,
        "seconds": seconds,
        "speedup": alone / seconds,
        "bytes_per_layer": sent,
        "bytes_formula": 0 if count == 1 else bytes_sent(layer, pattern, ranks, way.scheme)[1],
        "weight_bytes": said["held"],
        "link_bytes_per_second": link,
    }
    if way.weights == "sharded":
        whole = Way(way.k, way.scheme)
        row["weight_bytes_gathered"] = said["gathered"]
        row["seconds_over_whole"] = seconds / statistics.median(times[whole])
    elif count > 1:
        row["overhead"] = overhead(seconds, alone, ranks, sent * shape.depth, link)
    return row


def model_rows(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's speed-ups for 2, 4 and 8 GPUs beside the paper's, with the overhead factor that the measured runs
    gave."""
    rows = []
    for scheme in ("rb", "ulysses"):
        factors = [row["overhead"] for row in measured if row["scheme"] == scheme and "overhead" in row]
        factor = statistics.median(factors) if factors else 1.0
        for frames, grid in PAPER_GRIDS.items():
            for k in (None, 1, 2, 4):
                if k is None and scheme == "rb":
                    continue
                rows += [
                    _model_row(frames, grid, k, scheme, ranks, factor, i)
                    for ranks in (2, 4, 8)
                    for i in range(len(GPU_RATES))
                ]
    return rows


def _model_row(
    frames: int, grid: TokenGrid, k: int | None, scheme: str, ranks: int, factor: float, rates: int
) -> dict[str, Any]:
    layer, pattern = LayerShape(TokenLayout(grid), 24, 96), TilePattern(k)
    return {
        "kind": "model",
        "video_frames": frames,
        "frames": grid.t,
        "pattern": pattern.name(grid.t),
        "scheme": scheme,
        "ranks": ranks,
        "rates": GPU_RATES[rates].name,
        "overhead": factor,
        "speedup": speedup(layer, pattern, ranks, scheme, GPU_RATES[rates], factor),
        "bytes_per_layer": bytes_sent(layer, pattern, ranks, scheme)[1],
        "paper_speedup": PARALLEL_SPEEDUP.get((frames, ranks)),
    }
