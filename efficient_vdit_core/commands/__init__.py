"""The commands of `evdit`, one file each: `add_arguments` describes it, `run` does it and returns the exit status.

No command imports torch before it runs, so that --help is quick.
"""

from __future__ import annotations

import sys

from ..limits.quote import printable


def say(text: str = "") -> None:
    """A line for the user, on standard output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()
