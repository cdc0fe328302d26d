"""evdit bench gpu: all that a GPU can tell about the pack, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...limits.packages import install
from ...limits.quote import quoted
from .. import INTERRUPTED, ISSUES, say
from ..arguments import count, seed_number
from ..command_line import command_line
from .device import device_named

SHOWN = ("model", "clip", "backend", "pattern", "frames", "tokens_per_frame", "dtype", "head_dim", "milliseconds", "host_milliseconds",
         "kernel_milliseconds", "speedup", "efficiency", "passed", "forward_error", "gradient_errors", "chosen", "best", "regret",
         "trial_seconds", "size", "seconds", "amdahl_bound", "bound", "forward_bytes", "training_bytes", "stage", "seconds_a_step",
         "exit_code", "skipped", "error")  # fmt: skip


def add(commands: Any) -> None:
    gpu = commands.add_parser(
        "gpu", help="exactness, speed, memory and the choice of backend, in one run under a budget"
    )
    gpu.add_argument("--budget", type=count(10, 86_400), default=540, help="seconds, default: %(default)s")
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="one JSON file for each part goes there")
    gpu.add_argument("--parts", nargs="+", metavar="PART", help="only these, in the order of all, default: all")
    gpu.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    gpu.add_argument(
        "--device", default="auto", help="auto, cpu or cuda; a CPU takes tiny shapes, default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Raises ValueError at the end where a backend was not exact or its check raised, or a test failed."""
    from ...bench.gpu import PARTS, TESTS, Run, lacking, run_parts

    asked = PARTS if args.parts is None else args.parts
    for name in asked:
        if name not in PARTS:
            raise ValueError(f"--parts has {quoted(name)}, expected some of {', '.join(PARTS)}.")
    names = [name for name in PARTS if name in asked]  # a part's share of the budget counts on those before it
    args.out.mkdir(parents=True, exist_ok=True)
    found = Run(device_named(args.device), args.seed, args.budget, args.out, command=command_line())
    _tell_left_out(lacking(names))
    if "tests" in names and not TESTS.is_dir():
        say("tests: left out, because tests/gpu is not here; use a clone")
    try:
        run_parts(found, names, _tell)
    except KeyboardInterrupt:
        say(f"interrupted; results so far in {args.out}")
        return INTERRUPTED
    say(f"{found.spent:.0f} s; results in {args.out}")
    for name, why in found.incomplete.items():
        say(f"not complete: {name}: {why}")
    wrong = [r for r in found.rows.get("exact", []) if not r["passed"]]
    failed = [r for r in found.rows.get("tests", []) if r.get("exit_code", 0) not in (0, 5)]  # 5: nothing to run here
    raised = "exact" in found.failed  # a check that had no time tells nothing
    if wrong or failed or raised:
        what = f"{len(wrong)} of {len(found.rows['exact'])} checks" if wrong else "the check" if raised else "tests/gpu"
        raise ValueError(f"Not exact here: {what} failed; see {args.out}. Please report it with that folder: {ISSUES}")
    say(f"Please send the folder: {ISSUES}")
    return 0


def _tell_left_out(lacks: dict[str, list[str]]) -> None:
    for name, modules in lacks.items():
        say(f"{name}: left out, because {' and '.join(modules)} {'is' if len(modules) == 1 else 'are'} not installed")
    if lacks:
        say(install(*dict.fromkeys(module for modules in lacks.values() for module in modules)))


def _tell(part: str, row: dict[str, Any]) -> None:
    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    say(f"{part}: " + ", ".join(f"{name} {short(row[name])}" for name in SHOWN if row.get(name) is not None))
