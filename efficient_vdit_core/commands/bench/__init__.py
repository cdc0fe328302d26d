"""evdit bench: time the attention, one transformer step, several ranks, or the pack's overheads; draw a chart."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...files import check_writable_file, write_text
from ..arguments import count, seed_number
from ..command_line import command_line
from . import attention, compile, gpu, heads, mixture, overhead, parallel, peers, plot, step

# Each has add(commands), its arguments, and run(args) -> (device, rows).
BENCHES = {
    "attention": attention,
    "step": step,
    "parallel": parallel,
    "overhead": overhead,
    "mixture": mixture,
    "peers": peers,
    "heads": heads,
    "compile": compile,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the commands."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    for bench in BENCHES.values():
        command = bench.add(commands)
        command.add_argument(
            "--repeats", type=count(1, 10_000), default=5, help="runs whose median counts, default: %(default)s"
        )
        command.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda, default: %(default)s")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    gpu.add(commands)
    plot.add(commands)


def run(args: argparse.Namespace) -> int:
    """Times what was asked for and prints a table; ``--json`` keeps the figures with hardware, versions and command."""
    if args.bench_command in ("gpu", "plot"):  # these write files of their own
        return {"gpu": gpu, "plot": plot}[args.bench_command].run(args)
    if args.json:
        check_writable_file(args.json)
    device, rows = BENCHES[args.bench_command].run(args)
    if args.json:
        write_text(args.json, json.dumps(results(device, rows, args.seed, args.repeats), indent=1) + "\n")
    return 0


def results(device: Any, rows: list[dict[str, Any]], seed: int, repeats: int) -> dict[str, Any]:
    """A results file: the figures with hardware, versions and command."""
    from ...bench.machine import describe_machine

    return {
        "command": command_line(),
        "seed": seed,
        "repeats": repeats,
        "machine": describe_machine(device),
        "rows": rows,
    }
