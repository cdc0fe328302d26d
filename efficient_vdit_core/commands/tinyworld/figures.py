"""The figures of a command: on the screen, and in the file of ``--json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...storage.files import check_writable_file, write_text
from .. import say
from ..command_line import command_line


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def check_file(file: Path | None) -> None:
    """Raises before the work where the figures could not be written."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_writable_file(file)


def tell(figures: dict[str, Any], file: Path | None) -> None:
    """The figures and the command that gave them, for a person and in ``file``."""
    text = json.dumps({"command": command_line(), **figures}, indent=2)
    if file:
        write_text(file, text + "\n")
    say(text)
