"""The command that made a results file."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """As it was typed."""
    return "evdit " + shlex.join(sys.argv[1:])
