"""evdit bench mixture: consistency distillation against an exact solution."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .. import say
from ..arguments import count

HEARS = ("seed",)
SEGMENTS = (1, 2, 4, 8, 16)


def add(commands: Any) -> argparse.ArgumentParser:
    mixture = commands.add_parser(
        "mixture", help="consistency distillation of a 2-D mixture against the exact solution"
    )
    mixture.add_argument("--segments", type=count(1, 64), nargs="+", help=f"default: {' '.join(map(str, SEGMENTS))}")
    mixture.add_argument("--seeds", type=count(1, 1000), default=3, help="default: %(default)s")
    instead = mixture.add_mutually_exclusive_group()
    instead.add_argument(
        "--pairs",
        action="store_true",
        help="instead, every weight under every loss for epsilon, v and flow, 8 segments",
    )
    instead.add_argument(
        "--score",
        action="store_true",
        help="instead, what the score's term adds at 2 and 4 segments: samples against the true distribution",
    )
    return mixture


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...bench.mixture import MixtureShape, run

    if args.pairs or args.score:
        if args.segments is not None:
            raise ValueError(
                f"--segments is given with {'--pairs' if args.pairs else '--score'}, which has its own. Leave one of them out."
            )
        yield from _pairs(args) if args.pairs else _score(args)
        return
    say("path  segments  loss    seed   distilled: error  off %   undistilled: error  off %")
    for path in ("flow", "vp"):
        for segments in args.segments or SEGMENTS:
            for space in ("x", "z"):
                for seed in range(args.seed, args.seed + args.seeds):
                    row = run(MixtureShape(path=path, segments=segments, space=space), seed)
                    yield [row]
                    one, other = row["distilled"], row["undistilled"]
                    say(f"{path:<5} {segments:>8}  {space:<6} {seed:>5}   {one['endpoint_error']:>16.3f} {one['off_percent']:>6.1f}   "
                        f"{other['endpoint_error']:>18.3f} {other['off_percent']:>6.1f}")  # fmt: skip


def _pairs(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    from ...bench.pairs import compare_pairs

    say("prediction    loss     weight            seed   start: error  off %   distilled: error  off %")
    for seed in range(args.seed, args.seed + args.seeds):
        for row in compare_pairs(seed):
            yield [row]
            one, other = row["start"], row["distilled"]
            say(f"{row['prediction']:<13} {row['loss']:<8} {row['weight']:<16} {seed:>5}   {one['endpoint_error']:>12.3f} "
                f"{one['off_percent']:>6.1f}   {other['endpoint_error']:>16.3f} {other['off_percent']:>6.1f}")  # fmt: skip


def _score(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    from dataclasses import replace

    from ...bench.mixture_score import SHAPE, compare

    say("path  segments  seed  score's weight  energy distance  off %  deviation  rarest mode")
    for path in ("flow", "vp"):
        for segments in (2, 4):
            for seed in range(args.seed, args.seed + args.seeds):
                for row in compare(seed, replace(SHAPE, path=path, segments=segments)):
                    yield [row]
                    weight = "undistilled" if row["score_weight"] is None else f"{row['score_weight']:g}"
                    say(f"{path:<5} {segments:>8}  {seed:>4}  {weight:>14}  {row['energy_distance']:>15.4f}  {row['off_percent']:>5.1f}  "
                        f"{row['deviation']:>9.2f}  {row['rarest_mode']:>11.2f}")  # fmt: skip
