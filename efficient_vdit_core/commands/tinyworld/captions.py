"""evdit tinyworld captions: what a training may be told of a world, for samples of a teacher's own."""

from __future__ import annotations

import argparse
from typing import Any

from .. import say
from ..arguments import count, seed_number
from .world import add_world


def add(commands: Any) -> None:
    texts = commands.add_parser(
        "captions", help="write captions of the world for data.captions, none of which is held out for judging"
    )
    texts.add_argument("--count", type=count(1, 1_000_000), default=4096, help="default: %(default)s")
    texts.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    texts.add_argument("--out", default="captions.txt", metavar="FILE", help="one caption a line, default: %(default)s")
    add_world(texts)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ...storage.files import check_writable_file, write_text
    from ...tinyworld.worlds import WORLDS

    check_writable_file(args.out)
    world, rng = WORLDS[args.world], np.random.default_rng(args.seed)
    lines = [world.trained_on(world.random_words, rng).caption(int(rng.integers(3))) for _ in range(args.count)]
    write_text(args.out, "".join(f"{line}\n" for line in lines))
    say(f"{args.out}: {args.count} captions, {len(set(lines))} of them different")
    return 0
