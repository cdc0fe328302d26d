"""evdit tinyworld render: a true clip of the world with its caption."""

from __future__ import annotations

import argparse
from typing import Any

from .. import say
from ..arguments import seed_number


def add(commands: Any) -> None:
    draw = commands.add_parser("render", help="draw a true clip of the world with its caption")
    draw.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    draw.add_argument("--out", default="tinyworld.gif", metavar="FILE", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ...media.video import check_writable, write_video
    from ...tinyworld.moving.scene import random_scene, render

    scene = random_scene(np.random.default_rng(args.seed))
    write_video(
        check_writable(args.out), render(scene), fps=24, metadata={"prompt": scene.caption(), "seed": args.seed}
    )
    say(f"{args.out}: {scene.caption()}")
    return 0
