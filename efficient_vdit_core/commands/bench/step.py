"""evdit bench step: one forward with random weights, and the bounds of today's models."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...tiles import TilePattern
from .. import say
from ..arguments import count

HEARS = ("repeats", "seed", "device")


def add(commands: Any) -> argparse.ArgumentParser:
    step = commands.add_parser("step", help="one forward with random weights, beside Amdahl's bound")
    step.add_argument(
        "--model",
        choices=("opensora_plan", "minimax_h3", "wan_14b", "ltx2"),
        default="opensora_plan",
        help="opensora_plan is timed, of the others bounds are computed by FLOPs, and with --depth blocks of minimax_h3 and wan_14b are "
        "timed, default: %(default)s",
    )
    step.add_argument(
        "--size",
        help="a clip's name, default 29x720p; of minimax_h3 all, or one such as 1344x768-5s; a wrong one lists them",
    )
    step.add_argument(
        "--depth",
        type=count(0, 50),
        help="blocks to time: opensora_plan 1..32, default 32; minimax_h3 0..50 and wan_14b 0..40, default 0 = bounds alone",
    )
    step.add_argument(
        "--references", type=count(0, 1024), nargs="+", default=(4, 2, 1), help="k of the uniform plans, default: 4 2 1"
    )
    step.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: %(default)s"
    )
    return step


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...bench.step import SIZES, StepShape, measure

    if args.model != "opensora_plan":
        yield from _bounds(args, device)
        return
    size, depth = args.size or "29x720p", 32 if args.depth is None else args.depth
    _check_choice("--size", size, SIZES)
    if not 1 <= depth <= 32:
        raise ValueError(f"--depth is {depth}, expected 1 to 32 blocks.")
    shape = StepShape(size, depth, _sparse(args.references, SIZES[size][0]), args.dtype)
    rows = measure(shape, device, repeats=args.repeats, seed=args.seed)
    first = rows[0]
    say(
        f"{size}, {depth} of 32 blocks, {first['tokens']} tokens; attention is {first['attention_share']:.0%} of the dense step"
    )
    for r in rows:
        say(
            f"{r['pattern']:<7} {r['seconds']:>9.3f} s  {r['speedup']:>6.2f}x of dense, Amdahl's bound {r['amdahl_bound']:.2f}x"
        )
    yield rows


def _sparse(references: Sequence[int], frames: int) -> tuple[int, ...]:
    """Those that leave something out of a clip of so many latent frames. Raises ValueError where none does."""
    found = tuple(k for k in references if not TilePattern(k).is_full(frames))
    if not found:
        raise ValueError(
            f"--references is {' '.join(map(str, references))}, expected less than {frames - 1} of the clip's {frames} latent frames."
        )
    if left_out := [str(k) for k in references if k not in found]:
        say(f"not timed: {' '.join(left_out)} reference frames of the clip's {frames} leave nothing out")
    return found


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _bounds(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    """What a step of today's models gains at most, and what ``--depth`` blocks of them gained."""
    from ...bench.bounds import MODELS, gpu_forecasts, preset_bounds
    from ...bench.minimax_h3 import CLIPS, bounds
    from ...bench.timed_models import MEASURES

    depth, clips = args.depth or 0, MODELS[args.model].clips
    if args.size:
        _check_choice("--size", args.size, clips)
    most = MODELS[args.model].depth if args.model in MEASURES else 0
    if not 0 <= depth <= most:
        raise ValueError(f"--depth is {depth}, expected 0 (bounds alone) to {most} blocks for {args.model}.")
    if depth and not args.size:
        raise ValueError("--depth times blocks of one clip, and --size is missing. Name one, such as 1344x768-5s.")
    rows = []
    say("bounds by FLOPs, no measurement: attention at the matrices' rate, and at twice it (INT8 attention)")
    for name in [args.size] if args.size else clips:
        for row in preset_bounds(args.model, name):
            rows.append({"clip": name, "kind": "preset", **row})
            say(
                f"{name:<28} {row['tokens']:>7} tokens  attention {row['attention_share']:>4.0%} of a step  {row['preset']} "
                f"({row['pattern']}) leaves {row['attention_left']:>4.0%}: at most {row['bound']:.2f}x; INT8 attention alone "
                f"{row['int8_alone']:.2f}x, and the plan on it {row['with_int8']:.2f}x"
            )
        for row in gpu_forecasts(args.model, name):
            rows.append({"clip": name, "kind": "several GPUs, a model", **row})
            say(
                f"{'':<28} {row['gpus']} GPUs, {row['rates']}, plan {row['plan']}: {row['speedup']:.2f}x of one, "
                f"{row['speedup_overlapped']:.2f}x with exchanges beside the attention (a model)"
            )
        for row in bounds(CLIPS[name]) if args.model == "minimax_h3" else []:
            rows.append({"clip": name, "kind": "all layers alike", **row})
            say(
                f"{'':<28} {row['pattern']:<7} in all layers leaves {row['attention_left']:>4.0%}: at most {row['bound']:.2f}x, "
                f"with INT8 attention {row['bound_with_int8_attention']:.2f}x"
            )
    yield rows
    if depth:
        yield _measured_blocks(args, depth, device)


def _measured_blocks(args: argparse.Namespace, depth: int, device: Any) -> list[dict[str, Any]]:
    from ...bench.bounds import MODELS
    from ...bench.timed_models import MEASURES

    whole = MODELS[args.model]
    references = _sparse(args.references, whole.clips[args.size].grid.t)
    rows = MEASURES[args.model](
        args.size, depth, device, references=references, dtype=args.dtype, repeats=args.repeats, seed=args.seed
    )
    say(f"measured, {depth} of {whole.depth} blocks with random weights, {args.dtype}")
    for row in rows:
        say(
            f"{row['pattern']:<7} {row['seconds']:>9.3f} s  {row['speedup']:>6.2f}x of dense, bound {row['bound']:.2f}x"
        )
    return [{"clip": args.size, "kind": "measured", **row} for row in rows]
