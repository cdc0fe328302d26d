"""evdit tinyworld difference: whether one model is better than another, and how sure that is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import say
from ..command_line import command_line
from ..results import results_file


def add(commands: Any) -> None:
    pair = commands.add_parser(
        "difference",
        help="how many more clips are all right of one model than of another, of the same captions and noises",
    )
    pair.add_argument("one", type=Path, metavar="ONE", help="figures that evdit tinyworld eval --json wrote")
    pair.add_argument("other", type=Path, metavar="OTHER", help="those of the other model, taken from ONE's")
    pair.add_argument("--json", type=Path, metavar="FILE", help="write the difference there")


def run(args: argparse.Namespace) -> int:
    from ...storage.json_text import json_text
    from ...tinyworld.difference import difference

    with results_file(args.json, "the difference") as results:
        one, other = (_figures(file) for file in (args.one, args.other))
        found = difference(one, other, _captions(one, args.one))
        of = {name: figures.get("command", "") for name, figures in (("one", one), ("other", other))}
        found = {"command": command_line(), **of, **found}
        results.finish(found)
        say(json_text(found, indent=2).rstrip())
    return 0


def _figures(file: Path) -> dict[str, Any]:
    from ...limits.documents import parse_json, read_text
    from ...limits.quote import named

    what, advice = f"The file of figures {named(file.name)}", "Take one that evdit tinyworld eval --json wrote."
    found = parse_json(read_text(file, what), what, advice=advice)
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds no figures of one model. {advice}")
    return found


def _captions(figures: dict[str, Any], file: Path) -> list[str]:
    """Those of the clips, in their order."""
    from ...limits.quote import named, quoted
    from ...tinyworld.worlds import WORLDS

    world, clips = WORLDS.get(str(figures.get("world"))), figures.get("captions")
    if world is None or not isinstance(clips, int) or not 0 < clips <= 100_000:
        raise ValueError(
            f"{named(file.name)} has world {quoted(figures.get('world'))} and captions {quoted(clips)}, expected one of "
            f"{', '.join(WORLDS)} and a number up to 100000. Take a file that evdit tinyworld eval --json wrote."
        )
    return [scene.caption() for scene in world.held_out_scenes(clips)]
