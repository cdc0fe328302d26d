"""evdit bench parallel: a forward on several ranks against one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from ...limits.memory import check_memory
from ...limits.quote import quoted
from .. import say
from ..arguments import count

HEARS = ("repeats", "seed", "device")
MAX_RANKS = 64


def add(commands: Any) -> argparse.ArgumentParser:
    parallel = commands.add_parser("parallel", help="a forward on several ranks against one, and a model for GPUs")
    parallel.add_argument(
        "--ranks", default="1,2", help="ranks to time; 1 is always the yardstick, default: %(default)s"
    )
    parallel.add_argument(
        "--grid",
        type=count(1, 4096),
        nargs=3,
        default=(24, 8, 16),
        metavar=("T", "H", "W"),
        help="tokens, default: 24 8 16",
    )
    parallel.add_argument(
        "--depth", type=count(1, 64), default=2, help="blocks; real models have 32, default: %(default)s"
    )
    parallel.add_argument("--heads", type=count(1, 1024), default=24, help="heads of 96 channels, default: %(default)s")
    parallel.add_argument(
        "--references", type=count(0, 1024), nargs="+", default=(1, 2), help="k of the sparse patterns, default: 1 2"
    )
    parallel.add_argument(
        "--preset",
        choices=("h3",),
        help="MiniMax-H3's heads and its clip of 10 s at 1344x768, in place of --grid, --heads and --references",
    )
    return parallel


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...bench.parallel import ParallelShape, h3_shape, measure, model_rows
    from ...tiles import TokenGrid

    if not re.fullmatch(r"\d{1,2}(,\d{1,2})*", args.ranks) or max(map(int, args.ranks.split(","))) > MAX_RANKS:
        raise ValueError(f"--ranks is {quoted(args.ranks)}, expected numbers up to {MAX_RANKS} such as 1,2.")
    counts = sorted({int(part) for part in args.ranks.split(",")} - {0, 1})
    if not counts:
        raise ValueError(
            f"--ranks is {quoted(args.ranks)}, expected at least one number above 1: one rank alone is timed anyway."
        )
    own = ParallelShape(TokenGrid(*args.grid), args.depth, (None, *args.references), args.heads)
    shape = h3_shape(args.depth) if args.preset else own
    tokens, width = shape.grid.tokens, shape.head_dim * shape.heads
    activations, weights = 8 * tokens * width, args.depth * 12 * width**2
    check_memory(
        4 * (activations + weights) * max(counts),
        f"A grid of {shape.grid.t} x {shape.grid.h} x {shape.grid.w} tokens with {shape.heads} heads, on {max(counts)} ranks",
        "Lower --depth or --ranks." if args.preset else "Lower --grid, --heads, --depth or --ranks.",
    )
    rows: list[dict[str, Any]] = []
    for ranks in counts:
        devices = tuple(f"cuda:{i}" for i in range(ranks)) if device.type == "cuda" else ("cpu",) * ranks
        new = measure(shape, ranks, devices, repeats=args.repeats, seed=args.seed)
        rows += new
        yield new
        for r in new:
            say(f"{r['ranks']} ranks  {r['pattern']:<6} {r['scheme']:<8} weights {r['weights']:<8}{r['seconds']:>8.3f} s  "
                f"{r['speedup']:>5.2f}x  {r['bytes_per_layer'] / 2**20:>8.2f} MiB a layer and rank, "
                f"{r['weight_bytes'] / 2**20:.0f} MiB of weights{_gathered(r)}")  # fmt: skip
    modelled = model_rows(rows)
    yield modelled
    say("a model, not a measurement: speed-up on GPUs from stated rates, no overlap, overhead factor of the runs above")
    for r in modelled:
        paper = f", the paper's {r['paper_speedup']:.2f}x" if r["paper_speedup"] else ""
        say(f"{r['video_frames']} frames  {r['pattern']:<5} {r['scheme']:<8} {r['ranks']} GPUs  {r['rates']:<55} "
            f"{r['speedup']:>5.2f}x{paper}")  # fmt: skip


def _gathered(row: dict[str, Any]) -> str:
    """What a row of shared out weights adds."""
    if "weight_bytes_gathered" not in row:
        return ""
    return (
        f", {row['weight_bytes_gathered'] / 2**20:.0f} MiB sent in a forward for gathers: "
        f"{row['seconds_over_whole']:.2f} of the time with whole ones"
    )
