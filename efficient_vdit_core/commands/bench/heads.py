"""evdit bench heads: heads that differ, with and without neighbours and mean frames."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .. import say

HEARS = ("repeats", "seed", "device")


def add(commands: Any) -> argparse.ArgumentParser:
    heads = commands.add_parser(
        "heads", help="heads that differ, with and without neighbours and mean frames, against dense attention"
    )
    heads.add_argument(
        "--backend",
        choices=("auto", "frames", "triton", "flex", "parts"),
        default="frames",
        help="default: %(default)s",
    )
    return heads


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...attention import check_backend
    from ...bench.attention import geometric_mean
    from ...bench.heads import measure

    if args.backend != "auto":
        check_backend(args.backend, device)
    say(
        f"{'dtype':<9} {'frames x tokens':<16} {'window':>6} {'means':>6} {'groups':>6} {'density':>7} {'speed-up':>8} {'of ideal':>8}"
    )
    efficiencies = []
    for r in measure(device, repeats=args.repeats, seed=args.seed, backend=args.backend):
        yield [r]
        efficiencies.append(r["efficiency"])
        shape = f"{r['frames']} x {r['tokens_per_frame']}"
        say(
            f"{r['dtype']:<9} {shape:<16} {r['window']:>6} {r['means']:>6} {r['groups']:>6} {r['density']:>7.2f} {r['speedup']:>7.2f}x "
            f"{r['efficiency']:>8.2f}"
        )
    say(f"geometric mean of the ideal: {geometric_mean(efficiencies):.3f}")
