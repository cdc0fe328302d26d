"""evdit bench: time the attention, one transformer step, several ranks, or the pack's overheads; draw a chart."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import check_writable_file, write_text
from ..limits.documents import parse_json, read_text
from ..limits.memory import check_memory
from ..limits.quote import named, quoted
from . import say
from .arguments import count, seed_number

MAX_RANKS = 64
MAX_RESULTS = 2**26  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the commands attention, step, parallel, overhead and plot."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
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
    overhead = commands.add_parser("overhead", help="what import, patch and index work cost")
    mixture = commands.add_parser(
        "mixture", help="consistency distillation of a 2-D mixture against the exact solution"
    )
    mixture.add_argument(
        "--segments", type=count(1, 64), nargs="+", default=(1, 2, 4, 8, 16), help="default: 1 2 4 8 16"
    )
    mixture.add_argument("--seeds", type=count(1, 1000), default=3, help="default: %(default)s")
    mixture.add_argument(
        "--pairs",
        action="store_true",
        help="instead, every weight under every loss for epsilon, v and flow, 8 segments",
    )
    step, peers = _add_step(commands), _add_peers(commands)
    heads = commands.add_parser("heads", help="heads that differ, with and without neighbours, against dense attention")
    heads.add_argument("--backend", choices=("frames", "triton", "flex"), default="frames", help="default: %(default)s")
    for command in (attention, step, parallel, overhead, mixture, peers, heads):
        command.add_argument(
            "--repeats", type=count(1, 10_000), default=5, help="runs whose median counts, default: %(default)s"
        )
        command.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda, default: %(default)s")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    plot = commands.add_parser("plot", help="draw a results file of `evdit bench attention` as SVG")
    plot.add_argument("file", type=Path)
    plot.add_argument("--out", type=Path, help="default: the results file's name with .svg")


def _add_step(commands: Any) -> argparse.ArgumentParser:
    step = commands.add_parser("step", help="one forward with random weights, beside Amdahl's bound")
    step.add_argument(
        "--model",
        choices=("opensora_plan", "minimax_h3", "wan_14b", "ltx2"),
        default="opensora_plan",
        help="opensora_plan is timed, of the others bounds are computed by FLOPs, default: %(default)s",
    )
    step.add_argument(
        "--size",
        help="a clip's name, default 29x720p; of minimax_h3 all, or one such as 1344x768-5s; a wrong one lists them",
    )
    step.add_argument(
        "--depth",
        type=count(0, 50),
        help="blocks to time: opensora_plan 1..32, default 32; minimax_h3 0..50, default 0 = bounds alone",
    )
    step.add_argument(
        "--references", type=count(0, 1024), nargs="+", default=(4, 2, 1), help="k of the uniform plans, default: 4 2 1"
    )
    step.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: %(default)s"
    )
    return step


def _add_peers(commands: Any) -> argparse.ArgumentParser:
    peers = commands.add_parser("peers", help="the arrow mask beside ComfyUI's own sparse attention, at equal density")
    peers.add_argument("--model", default="tiny", help="a built-in model or a folder, default: %(default)s")
    peers.add_argument("--prompt", action="append", help="default: two of the tiny world")
    peers.add_argument("--frames", type=count(5, 10_000), default=93, help="default: %(default)s, 24 latent frames")
    peers.add_argument(
        "--size", type=count(64, 8192), nargs=2, default=(128, 256), metavar=("H", "W"), help="default: 128 256"
    )
    peers.add_argument("--steps", type=count(1, 1000), default=3, help="noise levels to look at, default: %(default)s")
    peers.add_argument("--references", type=count(0, 1024), nargs="+", default=(1, 2, 4, 6), help="default: 1 2 4 6")
    return peers


def run(args: argparse.Namespace) -> int:
    """Times what was asked for and prints a table; ``--json`` keeps the figures with hardware, versions and command."""
    if args.bench_command == "plot":
        return _plot(args)
    if args.json:
        check_writable_file(args.json)
    benches = {
        "attention": _attention,
        "step": _step,
        "parallel": _parallel,
        "overhead": _overhead,
        "mixture": _mixture,
        "peers": _peers,
        "heads": _heads,
    }
    device, rows = benches[args.bench_command](args)
    if args.json:
        from ..bench.machine import describe_machine

        command = "evdit " + shlex.join(sys.argv[1:])
        results = {
            "command": command,
            "seed": args.seed,
            "repeats": args.repeats,
            "machine": describe_machine(device),
            "rows": rows,
        }
        write_text(args.json, json.dumps(results, indent=1) + "\n")
    return 0


def _attention(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.attention import geometric_mean, measure, presets, with_heads

    device = _device(args.device)
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
        new = measure(shape, device, repeats=args.repeats, seed=args.seed, backends=tuple(args.backends))
        rows += new
        for r in new:
            extra = "-" if r["peak_extra_bytes"] is None else f"{r['peak_extra_bytes'] / 2**20:.0f}"
            say(f"{r['frames']:>6} x {r['tokens_per_frame']:<6}  {r['heads']:>2} x {r['head_dim']:<4}  {r['dtype']:<9} {r['pattern']:<8} "
                f"{r['backend']:<12} {r['milliseconds']:>7.1f}  {r['speedup']:>8.2f}x {r['ideal_speedup']:>6.2f} {r['efficiency']:>11.2f} "
                f"{r['tflops_per_second']:>8.3f} {extra:>10} {r['max_relative_error']:>8.1e}")  # fmt: skip
    sparse = [r["efficiency"] for r in rows if r["pattern"] != "full"]
    say(f"efficiency against the ideal, geometric mean of {len(sparse)} rows: {geometric_mean(sparse):.3f}")
    return device, rows


def _step(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.step import SIZES, StepShape, measure

    if args.model != "opensora_plan":
        return _bounds(args)
    size, depth = args.size or "29x720p", 32 if args.depth is None else args.depth
    _check_choice("--size", size, SIZES)
    if not 1 <= depth <= 32:
        raise ValueError(f"--depth is {depth}, expected 1 to 32 blocks.")
    device = _device(args.device)
    shape = StepShape(size, depth, tuple(args.references), args.dtype)
    rows = measure(shape, device, repeats=args.repeats, seed=args.seed)
    first = rows[0]
    say(
        f"{size}, {depth} of 32 blocks, {first['tokens']} tokens; attention is {first['attention_share']:.0%} of the dense step"
    )
    for r in rows:
        say(
            f"{r['pattern']:<7} {r['seconds']:>9.3f} s  {r['speedup']:>6.2f}x of dense, Amdahl's bound {r['amdahl_bound']:.2f}x"
        )
    return device, rows


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _bounds(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """What a step of today's models gains at most, and for MiniMax-H3 what ``--depth`` blocks gained."""
    from ..bench.bounds import MODELS, preset_bounds
    from ..bench.minimax_h3 import CLIPS, DEPTH, bounds

    depth, clips = args.depth or 0, MODELS[args.model].clips
    if args.size:
        _check_choice("--size", args.size, clips)
    most = DEPTH if args.model == "minimax_h3" else 0
    if not 0 <= depth <= most:
        raise ValueError(f"--depth is {depth}, expected 0 (bounds alone) to {most} blocks for {args.model}.")
    if depth and not args.size:
        raise ValueError("--depth times blocks of one clip, and --size is missing. Name one, such as 1344x768-5s.")
    device, rows = _device(args.device), []
    say("bounds by FLOPs, no measurement: attention at the matrices' rate, and at twice it (INT8 attention)")
    for name in [args.size] if args.size else clips:
        for row in preset_bounds(args.model, name):
            rows.append({"clip": name, "kind": "preset", **row})
            say(
                f"{name:<28} {row['tokens']:>7} tokens  attention {row['attention_share']:>4.0%} of a step  {row['preset']} "
                f"({row['pattern']}) leaves {row['attention_left']:>4.0%}: at most {row['bound']:.2f}x; INT8 attention alone "
                f"{row['int8_alone']:.2f}x, and the plan on it {row['with_int8']:.2f}x"
            )
        for row in bounds(CLIPS[name]) if args.model == "minimax_h3" else []:
            rows.append({"clip": name, "kind": "all layers alike", **row})
            say(
                f"{'':<28} {row['pattern']:<7} in all layers leaves {row['attention_left']:>4.0%}: at most {row['bound']:.2f}x, "
                f"with INT8 attention {row['bound_with_int8_attention']:.2f}x"
            )
    return device, rows + (_measured_blocks(args, depth, device) if depth else [])


def _measured_blocks(args: argparse.Namespace, depth: int, device: Any) -> list[dict[str, Any]]:
    from ..bench.minimax_h3 import CLIPS, DEPTH, measure

    clip = CLIPS[args.size]
    references = tuple(k for k in args.references if k < clip.frames - 1)
    rows = measure(clip, depth, device, references=references, dtype=args.dtype, repeats=args.repeats, seed=args.seed)
    say(f"measured, {depth} of {DEPTH} blocks with random weights, {args.dtype}")
    for row in rows:
        say(
            f"{row['pattern']:<7} {row['seconds']:>9.3f} s  {row['speedup']:>6.2f}x of dense, bound {row['bound']:.2f}x"
        )
    return [{"clip": args.size, "kind": "measured", **row} for row in rows]


def _parallel(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.parallel import ParallelShape, measure, model_rows
    from ..tiles import TokenGrid

    if not re.fullmatch(r"\d{1,2}(,\d{1,2})*", args.ranks) or max(map(int, args.ranks.split(","))) > MAX_RANKS:
        raise ValueError(f"--ranks is {quoted(args.ranks)}, expected numbers up to {MAX_RANKS} such as 1,2.")
    counts = sorted({int(part) for part in args.ranks.split(",")} - {0, 1})
    if not counts:
        raise ValueError(
            f"--ranks is {quoted(args.ranks)}, expected at least one number above 1: one rank alone is timed anyway."
        )
    tokens, width = math.prod(args.grid), 96 * args.heads
    activations, weights = 8 * tokens * width, args.depth * 12 * width**2
    check_memory(
        4 * (activations + weights) * max(counts),
        f"A grid of {' x '.join(map(str, args.grid))} tokens with {args.heads} heads, on {max(counts)} ranks",
        "Lower --grid, --heads, --depth or --ranks.",
    )
    device = _device(args.device)
    shape = ParallelShape(TokenGrid(*args.grid), args.depth, (None, *args.references), args.heads)
    rows: list[dict[str, Any]] = []
    for ranks in counts:
        devices = tuple(f"cuda:{i}" for i in range(ranks)) if device.type == "cuda" else ("cpu",) * ranks
        new = measure(shape, ranks, devices, repeats=args.repeats, seed=args.seed)
        rows += new
        for r in new:
            say(f"{r['ranks']} ranks  {r['pattern']:<6} {r['scheme']:<8} {r['seconds']:>8.3f} s  {r['speedup']:>5.2f}x  "
                f"{r['bytes_per_layer'] / 2**20:>8.2f} MiB a layer and rank")  # fmt: skip
    modelled = model_rows(rows)
    say("a model, not a measurement: speed-up on GPUs from stated rates, no overlap, overhead factor of the runs above")
    for r in modelled:
        paper = f", the paper's {r['paper_speedup']:.2f}x" if r["paper_speedup"] else ""
        say(f"{r['video_frames']} frames  {r['pattern']:<5} {r['scheme']:<8} {r['ranks']} GPUs  {r['rates']:<55} "
            f"{r['speedup']:>5.2f}x{paper}")  # fmt: skip
    return device, rows + modelled


PEERS_PROMPTS = (
    "a red circle moving right fast on a white background",
    "a blue square moving up slowly on a black background",
)


def _peers(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.peers import PeerRecord, peer
    from ..pipeline import Pipeline
    from ..search.watch import make_watching_override

    record = PeerRecord(tuple(args.references), peer())
    device = _device(args.device)
    pipeline = Pipeline.from_model(args.model, device=str(device), dtype="float32")
    height, width = args.size
    choices = {"frames": args.frames, "height": height, "width": width, "steps": args.steps, "segments": args.steps}
    requests = [
        pipeline.request(prompt, guidance=1.0, seed=args.seed, **choices) for prompt in args.prompt or PEERS_PROMPTS
    ]
    for request in requests:
        pipeline.observe(request, make_watching_override(record.add))
    rows = record.rows()
    assert record.layout is not None
    grid = record.layout.grid
    say(
        f"{args.model}, {grid.t} latent frames of {grid.tokens_per_frame} tokens; relative error of the attention, mean of calls"
    )
    say("layer  reference frames  method    density    error")
    for r in rows:
        say(f"{r['layer']:>5}  {r['reference_frames']:>16}  {r['method']:<8} {r['density']:>8.3f} {r['error']:>8.3f}")
    return device, rows


def _overhead(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.overhead import measure

    rows = measure(args.repeats)
    for r in rows:
        say(f"{r['what']:<50} {r['milliseconds']:>8.2f} ms, limit {r['limit']:g} ms")
    return _device("cpu"), rows


def _heads(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.attention import geometric_mean
    from ..bench.heads import measure

    device = _device(args.device)
    say(
        f"{'dtype':<9} {'frames x tokens':<16} {'window':>6} {'groups':>6} {'density':>7} {'speed-up':>8} {'of ideal':>8}"
    )

    def row(r: dict[str, Any]) -> None:
        shape = f"{r['frames']} x {r['tokens_per_frame']}"
        say(
            f"{r['dtype']:<9} {shape:<16} {r['window']:>6} {r['groups']:>6} {r['density']:>7.2f} {r['speedup']:>7.2f}x "
            f"{r['efficiency']:>8.2f}"
        )

    rows = measure(device, repeats=args.repeats, seed=args.seed, backend=args.backend, report=row)
    say(f"geometric mean of the ideal: {geometric_mean([r['efficiency'] for r in rows]):.3f}")
    return device, rows


def _mixture(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    from ..bench.mixture import MixtureShape, run

    if args.pairs:
        return _device("cpu"), _pairs(args)
    rows = []
    say("path  segments  loss    seed   distilled: error  off %   undistilled: error  off %")
    for path in ("flow", "vp"):
        for segments in args.segments:
            for space in ("x", "z"):
                for seed in range(args.seed, args.seed + args.seeds):
                    row = run(MixtureShape(path=path, segments=segments, space=space), seed)
                    rows.append(row)
                    one, other = row["distilled"], row["undistilled"]
                    say(f"{path:<5} {segments:>8}  {space:<6} {seed:>5}   {one['endpoint_error']:>16.3f} {one['off_percent']:>6.1f}   "
                        f"{other['endpoint_error']:>18.3f} {other['off_percent']:>6.1f}")  # fmt: skip
    return _device("cpu"), rows


def _pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    from ..bench.pairs import compare_pairs

    rows = []
    say("prediction    loss     weight            seed   start: error  off %   distilled: error  off %")
    for seed in range(args.seed, args.seed + args.seeds):
        for row in compare_pairs(seed):
            rows.append(row)
            one, other = row["start"], row["distilled"]
            say(f"{row['prediction']:<13} {row['loss']:<8} {row['weight']:<16} {seed:>5}   {one['endpoint_error']:>12.3f} "
                f"{one['off_percent']:>6.1f}   {other['endpoint_error']:>16.3f} {other['off_percent']:>6.1f}")  # fmt: skip
    return rows


def _plot(args: argparse.Namespace) -> int:
    from ..bench.plot import draw

    what = named(str(args.file))
    results = parse_json(
        read_text(args.file, what, limit=MAX_RESULTS), what, advice="Make one with --json.", limit=MAX_RESULTS
    )
    try:
        chart = draw(results)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{what} is no results file of `evdit bench attention`. Make one with --json.") from error
    out = args.out or args.file.with_suffix(".svg")
    write_text(out, chart)
    say(f"{out}")
    return 0


def _device(name: str) -> Any:
    import torch

    from ..pipeline import pick_device

    return torch.device(pick_device(name))
