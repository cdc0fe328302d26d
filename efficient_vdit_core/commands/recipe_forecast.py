"""evdit recipe three-stage --plan-memory: what a recipe will hold and how long it will take, before it runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..limits.quote import quoted
from . import say
from .arguments import quantity

if TYPE_CHECKING:
    from ..distill.forecast.memory import MemoryPlan
    from ..distill.forecast.recipe import Part

GPU = "24GB"
# TFLOP/s in bf16: an H100 in published trainings of video transformers, and what a 4090 may reach.
H100, RTX_4090 = 300.0, 100.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes --plan-memory and what it is told of the machine."""
    parser.add_argument("--plan-memory", action="store_true",
                        help="only say what each part will hold on a GPU, and how long it will take")  # fmt: skip
    parser.add_argument("--gpu", type=gpu_bytes, metavar="SIZE", help=f"its memory, default: {GPU}")
    parser.add_argument("--tflops", type=quantity(0.001, 1e6), metavar="N",
                        help=f"what the GPUs together reach in a training; default: {RTX_4090:g}, a 4090's, or an H100's {H100:g} "
                        f"where --gpu is above {GPU}")  # fmt: skip
    parser.add_argument(
        "--hours", type=quantity(0.01, 1e6), metavar="N", help="also say how many steps fit into so many hours"
    )


def refuse_alone(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that --plan-memory alone hears: who gives it does not expect the training to start."""
    for name in ("gpu", "tflops", "hours"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name} is given without --plan-memory, and would change nothing of the training. Add --plan-memory, or leave it "
                "out."
            )


def say_forecast(stages: Any, args: argparse.Namespace) -> int:
    """Bytes of each part by what they are for, what to change where they do not fit, and the hours; 1 where one does not
    fit."""
    from ..distill.families.open_model import open_model
    from ..distill.forecast.advice import advice, fits
    from ..distill.forecast.memory import gib
    from ..distill.forecast.recipe import SEARCH, Part, forecast
    from ..distill.runs.checks import check_hosted, check_training, check_where_asked
    from ..distill.runs.sequence_parallel import check_shares

    for stage in stages.planned():
        check_training(stage)
        check_hosted(stage)
        check_where_asked(stage)
        check_shares(stage, open_model(stage.model))
    gpu = args.gpu or gpu_bytes(GPU)
    tflops = args.tflops or (H100 if gpu > gpu_bytes(GPU) else RTX_4090)
    parts, all_fit = list[Part](), True
    for part in forecast(stages):
        parts.append(part)
        fit = fits(part.memory, gpu)
        say(f"{part.name}: {gib(part.memory.peak())}, {'fits' if fit else 'does not fit'} into {gib(gpu)}")
        say(f"  {_work(part, tflops)}")
        if part.name == SEARCH:
            say("  by one GPU alone, while the others wait: on N GPUs that takes N times as long")
        for name, size in _sizes(part.memory):
            say(f"  {name:<24} {gib(size):>12}")
        if not fit and part.stage:
            for line in advice(part.stage, gpu, part.frozen, f"{part.stage.method}_training"):
                say(f"  {line}")
        elif not fit:
            say("  a smaller batch in the training, or fewer data.frames")
        all_fit = all_fit and fit
    _say_hours(parts, tflops, args.hours)
    return 0 if all_fit else 1


def _sizes(plan: MemoryPlan) -> Iterator[tuple[str, int]]:
    sizes = plan.held | {f"{name}, before it": held for name, held in plan.before.items()}
    yield from ((name, size) for name, size in sizes.items() if size)
    if plan.host:
        yield "in the host memory", plan.host


def _work(part: Part, tflops: float) -> str:
    work, runs = part.work, f", once for each of {part.times} plans" if part.times > 1 else ""
    size = f"{work.flops / 1e12:,.{1 if work.flops < 1e13 else 0}f} TFLOP"
    what = "examples" if part.stage else "forwards"
    return f"{work.examples:,} {what} of {size}: {_time(work.hours(tflops))} at {tflops:g} TFLOP/s{runs}"


def _time(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes" if hours >= 1 / 60 else "under a minute"


def _say_hours(parts: list[Part], tflops: float, hours: float | None) -> None:
    from ..distill.forecast.recipe import SAMPLES, steps_within

    total = sum(part.hours(tflops) for part in parts)
    say(f"all: {_time(total)} at {tflops:g} TFLOP/s")
    if hours is None:
        return
    steps = steps_within(parts, hours, tflops)
    if not steps or not all(steps.values()):
        fewer = "data.clips or data.frames" if any(part.name == SAMPLES for part in parts) else "data.frames"
        say(f"  {hours:g} hours are too few for a step of each training: fewer {fewer}, or a smaller size")
    elif total > hours:
        changes = " ".join(f"--set {name}_training.steps={n}" for name, n in steps.items())
        say(f"  for {hours:g} hours: {changes}")


def gpu_bytes(text: str) -> int:
    """``24GB`` as GPUs are sold: 24 GiB."""
    found = re.fullmatch(r"(\d{1,4}(?:\.\d{1,3})?)\s*(?:GB|GiB|G)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"it is {quoted(text)}, expected a GPU's memory such as 24GB")
    return round(float(found[1]) * 2**30)
