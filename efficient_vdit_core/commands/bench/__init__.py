"""evdit bench: time the attention, one transformer step, several ranks, or the pack's overheads; measure a distillation; draw a chart."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import count, seed_number
from ..command_line import command_line
from ..results import results_file
from . import attention, compile, gpu, heads, mixture, overhead, parallel, peers, plot, step, walk
from .device import device_named
from .verdict import Verdict

# Each has add(commands), its arguments; HEARS, those of COMMON that change what it does; and run(args, device), which
# yields rows as they are measured.
BENCHES = {
    "attention": attention,
    "step": step,
    "parallel": parallel,
    "overhead": overhead,
    "mixture": mixture,
    "peers": peers,
    "heads": heads,
    "compile": compile,
    "walk": walk,
}
COMMON: dict[str, tuple[Callable[[str], Any], Any, str]] = {
    "repeats": (count(1, 10_000), 5, "runs whose median counts, default: %(default)s"),
    "seed": (seed_number, 0, "default: %(default)s"),
    "device": (str, "auto", "auto, cpu or cuda, default: %(default)s"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the commands."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    for bench in BENCHES.values():
        command = bench.add(commands)
        for name, (type_, default, text) in COMMON.items():
            text = text if name in bench.HEARS else "nothing here depends on it"
            command.add_argument(f"--{name}", type=type_, default=default, help=text)
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="write the results there; what comes before Ctrl-C, to FILE.part"
        )
    gpu.add(commands)
    plot.add(commands)


def run(args: argparse.Namespace) -> int:
    """Times what was asked for and prints a table; ``--json`` keeps the figures with hardware, versions and command. Until
    all is measured they stand in FILE.part: what ends a bench early costs no row that it has, and no older results."""
    if args.bench_command in ("gpu", "plot"):  # these write files of their own
        return {"gpu": gpu, "plot": plot}[args.bench_command].run(args)
    bench, rows, verdict = BENCHES[args.bench_command], [], None
    with results_file(args.json) as results:
        device = device_named(args.device if "device" in bench.HEARS else "cpu")
        try:
            for new in bench.run(args, device):
                rows += new
                results.keep(_about(args, device), rows)
        except Verdict as error:
            verdict = error
        results.finish(_about(args, device), rows)
    if verdict:
        raise verdict
    return 0


def _about(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """What a results file says beside its figures: hardware, versions and command."""
    from ...bench.machine import describe_machine

    heard = BENCHES[args.bench_command].HEARS
    return {
        "command": command_line(),
        **{name: getattr(args, name) for name in COMMON if name in heard and name != "device"},
        "machine": describe_machine(device),
    }
