"""train, evaluate and render the tiny world that the built-in model knows"""

from __future__ import annotations

import argparse

from . import captions, crossing_bounds, crossing_render, difference, evaluate, read_back, render, train

# Each has add(commands), its arguments, and run(args) -> exit status.
TASKS = {
    "train": train,
    "eval": evaluate,
    "difference": difference,
    "read-back": read_back,
    "render": render,
    "captions": captions,
    "crossing-render": crossing_render,
    "crossing-bounds": crossing_bounds,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the commands."""
    commands = parser.add_subparsers(dest="tinyworld_command", required=True, metavar="COMMAND")
    for task in TASKS.values():
        task.add(commands)


def run(args: argparse.Namespace) -> int:
    return TASKS[args.tinyworld_command].run(args)
