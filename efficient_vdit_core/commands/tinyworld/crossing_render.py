"""evdit tinyworld crossing-render: true clips of the crossing world with their captions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...storage.files import write_text
from .. import say
from ..arguments import count, seed_number


def add(commands: Any) -> None:
    cross = commands.add_parser(
        "crossing-render", help="draw true clips of the crossing world, two shapes that pass a bar and each other"
    )
    cross.add_argument("--clips", type=count(1, 1_000_000), default=8, help="default: %(default)s")
    cross.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    cross.add_argument(
        "--out",
        type=Path,
        default=Path("crossing"),
        metavar="FOLDER",
        help="for the clips, each with its caption in a .txt file beside it; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ...media.video import check_writable, write_video
    from ...tinyworld.crossing.scene import random_scene, render

    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    for number in range(args.clips):
        scene = random_scene(rng)
        file, caption = args.out / f"{number:05d}.mp4", scene.caption(number)
        write_video(check_writable(file), render(scene), fps=24, metadata={"prompt": caption, "seed": args.seed})
        write_text(file.with_suffix(".txt"), caption + "\n")
        say(f"{file}: {caption}")
    return 0
