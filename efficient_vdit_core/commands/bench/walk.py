"""evdit bench walk: how fine a teacher must walk for what a student learns from it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import say
from ..arguments import count

HEARS = ("seed", "device")
STEPS = (16, 24, 32, 48)


def add(commands: Any) -> argparse.ArgumentParser:
    walk = commands.add_parser(
        "walk", help="how near a teacher's coarse steps come to its fine way, for teacher_steps and teacher_order"
    )
    walk.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="of evdit distill consistency or score, default: the tiny model in 4 segments, guidance 3",
    )
    walk.add_argument(
        "--steps", type=count(1, 1000), nargs="+", default=STEPS, help=f"default: {' '.join(map(str, STEPS))}"
    )
    walk.add_argument("--fine", type=count(1, 1000), default=192, help="steps of the fine way, default: %(default)s")
    walk.add_argument("--clips", type=count(1, 10_000), default=8, help="default: %(default)s")
    return walk


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...bench.walk import measure
    from ...distill.config import DistillConfig

    config = (
        DistillConfig.load(args.config, "consistency")
        if args.config
        else DistillConfig.from_dict({"method": "consistency", "objective": {"segments": 4, "guidance": 3.0}})
    )
    say("order  steps   clip    at the segments' ends, the noisiest first")
    for row in measure(config, device, clips=args.clips, steps=args.steps, fine=args.fine, seed=args.seed):
        yield [row]
        say(f"{row['order']:>5}  {row['steps']:>5}  {row['clip']:.4f}  {' '.join(f'{end:.4f}' for end in row['ends'])}")
