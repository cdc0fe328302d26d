"""evdit bench compile: the Triton kernels, compiled for GPUs that are not here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from .. import say
from ..arguments import count
from .verdict import Verdict

HEARS = ()


def add(commands: Any) -> argparse.ArgumentParser:
    compile_ = commands.add_parser("compile", help="the kernels for GPUs that are not here: spills, shared memory")
    compile_.add_argument(
        "--archs",
        nargs="+",
        metavar="ARCH",
        help="such as sm_90 gfx942, default: sm_80 sm_90 sm_120; all = all of them",
    )
    compile_.add_argument(
        "--dims", type=int, nargs="+", choices=(64, 96, 128), default=(96, 128), help="head_dim, default: 96 128"
    )
    compile_.add_argument("--jobs", type=count(1, 256), default=os.cpu_count() or 1, help="default: one a core")
    return compile_


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    """Raises ValueError where a kernel fails for an architecture, after all were compiled."""
    try:
        from ...bench import compile_ahead
    except ImportError as error:
        raise ValueError("The registry's build of the pack compiles nothing ahead of time. Use a clone.") from error
    every = tuple(compile_ahead.ARCHITECTURES)
    chosen = every if args.archs == ["all"] else tuple(args.archs or compile_ahead.QUICK)
    if unknown := set(chosen) - set(every):
        raise ValueError(f"--archs has {sorted(unknown)[0]!r}, expected some of {', '.join(every)}, or all.")
    done, state = [], {"kernels": compile_ahead.kernels_hash()}
    for outcome in compile_ahead.compile_cases(compile_ahead.cases(chosen, tuple(args.dims)), args.jobs):
        done.append(outcome)
        yield [{**state, **outcome.row()}]
        case = outcome.case
        say(
            f"{'ok  ' if outcome.passed else 'FAIL'} {case.architecture:<8} {case.kernel:<26} {case.head_dim:>3}  {outcome.crash}"
        )
        for c in outcome.configs:
            about = c.error or (
                f"shared {c.shared // 1024} KiB, {c.registers} registers, spill {c.spill} bytes, {c.matrix} matrix and "
                f"{c.asynchronous} asynchronous instructions"
            )
            say(f"       {c.config}: {about}{'  <- ' + '; '.join(c.faults) if c.faults and not c.error else ''}")
    failed = [o.case for o in done if not o.passed]
    say(f"{len(done) - len(failed)} passed, {len(failed)} failed")
    if failed:
        names = ", ".join(f"{c.kernel} {c.head_dim} on {c.architecture}" for c in failed[:6])
        raise Verdict(f"A config of these kernels has a fault: {names}. Change their tiles in arrow_kernels.py.")
