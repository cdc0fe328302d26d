"""Which of the two worlds a command is for."""

from __future__ import annotations

import argparse


def add_world(command: argparse.ArgumentParser) -> None:
    """The names of ``worlds.WORLDS``, which takes torch to import."""
    command.add_argument(
        "--world",
        choices=("moving", "crossing"),
        default="moving",
        help="moving: one shape over a plain ground; crossing: two behind a bar, default: %(default)s",
    )
