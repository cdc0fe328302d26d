"""evdit tinyworld crossing-bounds: what the judge of the crossing world says of clips that no model made."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import count
from .figures import add_json, figures_file


def add(commands: Any) -> None:
    bounds = commands.add_parser(
        "crossing-bounds", help="what the judge of the crossing world says of true clips, blurred ones and those of other captions"
    )  # fmt: skip
    bounds.add_argument("--clips", type=count(2, 100_000), default=100, help="default: %(default)s")
    add_json(bounds)


def run(args: argparse.Namespace) -> int:
    from ...tinyworld.crossing.bounds import bounds

    with figures_file(args.json, args.clips) as out:
        out.finish(bounds(args.clips, out.judged))
    return 0
