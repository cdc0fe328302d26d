"""evdit tinyworld read-back: how well true clips come back that are encoded and decoded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..arguments import count
from .figures import add_json, figures_file
from .world import add_world


def add(commands: Any) -> None:
    back = commands.add_parser(
        "read-back",
        help="how well true clips come back that are encoded and decoded: the most that a transformer can reach",
    )
    back.add_argument("--vae", type=Path, metavar="PATH", help="its folder or file; default: the built-in one")
    back.add_argument("--clips", type=count(1, 100_000), default=40, help="default: %(default)s")
    add_world(back)
    add_json(back)


def run(args: argparse.Namespace) -> int:
    import torch

    from ...assets import tiny_path
    from ...bench.machine import describe_machine
    from ...models.opensora_plan.checkpoint import load_vae
    from ...tinyworld.train.vae import read_back
    from ...tinyworld.worlds import WORLDS

    about = {"machine": describe_machine(torch.device("cpu")), "world": args.world}
    with figures_file(args.json, args.clips, about) as out:
        vae = load_vae(args.vae or tiny_path("vae", "tiny"), dtype=torch.float32)
        out.finish(read_back(vae, WORLDS[args.world], args.clips, out.judged))
    return 0
