"""Times a forward on several ranks of this machine against one, by both schemes, and carries the result to GPUs by a
model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import TokenLayout
from ..parallel.pool.imports import Host
from ..parallel.pool.session import Launch, Session
from ..parallel.sharding.forecast import GPU_RATES, LayerShape, bytes_sent, overhead, speedup
from ..tiles import TilePattern, TokenGrid
from .minimax_h3 import CLIPS, HEAD_DIM, HEADS, Clip
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


def h3_shape(clip: Clip = CLIPS["1344x768-10s"], depth: int = 2) -> ParallelShape:
    """MiniMax-H3's heads and its video, under as many reference frames as its presets have (strides 10 and 5). The text
    and the sound before the video, a twentieth of the sequence, are left out, and the width is that of all heads."""
    ks = (None, -(-clip.frames // 10), -(-clip.frames // 5))
    return ParallelShape(clip.layout.grid, depth, ks, HEADS, HEAD_DIM)


def measure(
    shape: ParallelShape, ranks: int, devices: tuple[str, ...], *, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Rows for one rank alone and for ``ranks``, by each scheme and pattern, in turns within each repeat; medians.

    Raises RuntimeError where the sharded result is not the single rank's.
    """
    config = {"num_layers": shape.depth, "num_attention_heads": shape.heads, "attention_head_dim": shape.head_dim}
    grid = [shape.grid.t, shape.grid.h, shape.grid.w]
    launch = Launch(devices, "bench", {"config": config, "grid": grid, "seed": seed}, TIMEOUT, TIMEOUT, HOST)
    runs = [
        (k, scheme) for k in shape.ks for scheme in (("alone", "ulysses") if k is None else ("alone", "rb", "ulysses"))
    ]
    times: dict[tuple[int | None, str], list[float]] = {run: [] for run in runs}
    sent: dict[tuple[int | None, str], dict[str, Any]] = {}
    session = Session()
    try:
        for turn in range(repeats + 1):
            for run in runs:
                said, tensors = session.step(launch, {"k": run[0], "scheme": run[1]}, {})
                if turn:  # the first one warms up, and is compared
                    times[run].append(max(answer["seconds"] for answer in said))
                else:
                    sent[run] = {"bytes": max(a["bytes"] for a in said), "out": tensors["out"]}
                    _check(sent[run]["out"], sent[run[0], "alone"]["out"])
        link = min(test["gigabytes_per_second"] for test in session.tests) * 1e9
    finally:
        session.stop()
    item = 4 if devices[0] == "cpu" else 2
    return [_row(shape, ranks, run, times, sent[run]["bytes"] // shape.depth, link, item) for run in runs]


def _check(got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not error < (1e-3 if got.dtype == torch.float32 else 0.1):
        raise RuntimeError(
            f"The sharded forward differs from one rank's by {error:.2g} of its largest value; its timings mean nothing."
        )


def _row(
    shape: ParallelShape,
    ranks: int,
    run: tuple[int | None, str],
    times: dict[tuple[int | None, str], list[float]],
    sent: int,
    link: float,
    item: int,
) -> dict[str, Any]:
    k, scheme = run
    pattern, layer = TilePattern(k), shape.layer(item)
    seconds, alone = statistics.median(times[run]), statistics.median(times[k, "alone"])
    count = 1 if scheme == "alone" else ranks
    row = {
        "kind": "measured",
        "ranks": count,
        "frames": shape.grid.t,
        "tokens_per_frame": shape.grid.tokens_per_frame,
        "depth": shape.depth,
        "pattern": pattern.name(shape.grid.t),
        "scheme": scheme,
        "seconds": seconds,
        "speedup": alone / seconds,
        "bytes_per_layer": sent,
        "bytes_formula": 0 if count == 1 else bytes_sent(layer, pattern, ranks, scheme)[1],
        "link_bytes_per_second": link,
    }
    if count > 1:
        row["overhead"] = overhead(seconds, alone, ranks, sent * shape.depth, link)
    return row


def model_rows(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's speed-ups for 2, 4 and 8 GPUs beside the paper's, with the overhead factor that the measured runs
    gave."""
    rows = []
    for scheme in ("rb", "ulysses"):
        factors = [row["overhead"] for row in measured if row["scheme"] == scheme]
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
