"""The command, run in this process."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

from efficient_vdit_core import cli

Call = Callable[[], Any]


class Said(str):
    """What a command printed as its error."""


class Reached(Exception):
    """The work that a valid case would start."""


def evdit(*argv: str) -> Call:
    """The command in this process; returns its error, or nothing where it ended well."""

    def call() -> Said | None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(list(argv))
            except (Reached, SystemExit):
                return None
        if not status:
            return None
        return Said(err.getvalue().splitlines()[-1] if err.getvalue().strip() else "")

    return call
