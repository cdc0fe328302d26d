"""evdit bench attention: dense attention against every backend."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .. import say
from ..arguments import count
from .verdict import Verdict

HEARS = ("repeats", "seed", "device")


def add(commands: Any) -> argparse.ArgumentParser:
    attention = commands.add_parser("attention", help="dense attention against every backend, in pairs")
    attention.add_argument(
        "--preset",
        choices=("paper", "cpu", "wan", "h3", "ltx"),
        default="cpu",
        help="shapes to time, default: %(default)s",
    )
    attention.add_argument(
        "--frames", type=count(1, 1024), nargs="+", help="only the preset's shapes with these latent frame counts"
    )
    attention.add_argument(
        "--tokens", type=count(1, 2**20), nargs="+", help="only the preset's shapes with these tokens a frame"
    )
    attention.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="only the preset's shapes of this dtype"
    )
    attention.add_argument("--heads", type=count(1, 1024), help="fewer heads than the preset has, for a small machine")
    attention.add_argument("--backends", nargs="+", default=(), help="default: all that run here")
    attention.add_argument(
        "--calls", action="store_true", help="also time the dense calls alone, which no assembly of them can beat"
    )
    return attention


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...attention import check_backend
    from ...attention.backends.registry import BACKENDS
    from ...bench.attention import geometric_mean, measure, presets, with_heads

    for name in args.backends:
        if name not in ("auto", "dense"):  # these run everywhere
            check_backend(name, device)
    shapes = [
        s for s in with_heads(presets()[args.preset], args.heads)
        if (not args.frames or s.frames in args.frames) and (not args.tokens or s.tokens in args.tokens)
        and args.dtype in (None, s.dtype)
    ]  # fmt: skip
    if not shapes:
        raise ValueError(
            f"No shape of the preset {args.preset!r} is left by --frames, --tokens and --dtype. Leave one of them out."
        )
    rows: list[dict[str, Any]] = []
    say(
        "frames x tokens  heads      dtype     pattern  backend          ms   speed-up  ideal  efficiency  TFLOP/s  extra MiB    error"
    )
    for shape in shapes:
        new = measure(
            shape, device, repeats=args.repeats, seed=args.seed, backends=tuple(args.backends), calls=args.calls
        )
        rows += new
        yield new
        for r in new:
            about = (
                f"{r['frames']:>6} x {r['tokens_per_frame']:<6}  {r['heads']:>2} x {r['head_dim']:<4}  {r['dtype']:<9} "
                f"{r['pattern']:<8} {r['backend']:<12}"
            )
            say(f"{about} {_figures(r) if 'milliseconds' in r else r['error']}")
    # What has no error computes something else, or puts nothing together; dense attention leaves nothing out.
    ran = [r for r in rows if r["pattern"] != "full" and r.get("max_relative_error") is not None]
    if not ran:
        raise Verdict(f"No backend runs here: {rows[-1]['error']}. Name others by --backends.")
    # Those over a named kernel show what it gains, INT8 ones among them, and are compared with exact attention.
    if sparse := [r["efficiency"] for r in ran if r["backend"] in BACKENDS]:
        say(f"efficiency against the ideal, geometric mean of {len(sparse)} rows: {geometric_mean(sparse):.3f}")


def _figures(r: dict[str, Any]) -> str:
    error = "-" if r["max_relative_error"] is None else f"{r['max_relative_error']:.1e}"
    extra = "-" if r["peak_extra_bytes"] is None else f"{r['peak_extra_bytes'] / 2**20:.0f}"
    return (
        f"{r['milliseconds']:>7.1f}  {r['speedup']:>8.2f}x {r['ideal_speedup']:>6.2f} {r['efficiency']:>11.2f} "
        f"{r['tflops_per_second']:>8.3f} {extra:>10} {error:>8}"
    )
