"""The commands of `evdit`, one file each: `add_arguments` describes it, `run` does it and returns the exit status.

No command imports torch before it runs, so that --help is quick.
"""

from __future__ import annotations

import sys

from ..limits.quote import printable

ISSUES = "https://github.com/efficient-vdit/efficient-vdit/issues"  # where reports go
INTERRUPTED = 130  # the status after Ctrl-C, by the shell's convention: 128 + SIGINT


def say(text: str = "") -> None:
    """A line for the user, on standard output. What its encoding lacks is escaped: a name must not end a command, whose
    result may still be unwritten. A pipe on Windows has a code page of some 200 letters."""
    line = printable(text) + "\n"
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
