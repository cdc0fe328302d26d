"""What the command line takes: numbers within their range, and a mistake told in one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..limits.numbers import MAX_TORCH_SEED, number, whole
from ..limits.quote import message, quoted, shortened
from ..storage.files import check_writable_file


class Parser(argparse.ArgumentParser):
    """Its subcommands' parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        """A mistake of the user like any other, in place of the whole usage, which may be longer than the screen."""
        raise ValueError(f"{shortened(message, 250).rstrip('.')}; '{self.prog} --help' lists the options.")


def one_line(text: str) -> str:
    """A message as it is printed."""
    return message(text.replace("\n", " ")) + "\n"


def count(low: int, high: int) -> Callable[[str], int]:
    """A whole number from ``low`` to ``high``, as argparse's ``type``."""

    def read(text: str) -> int:
        try:
            return whole(int(text), "the value", low, high)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"it is {quoted(text)}, expected a whole number from {low} to {high:,}"
            ) from None

    return read


def quantity(low: float, high: float) -> Callable[[str], float]:
    """A number from ``low`` to ``high``, as argparse's ``type``."""

    def read(text: str) -> float:
        try:
            return number(float(text), "the value", low, high)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"it is {quoted(text)}, expected a number from {low:g} to {high:g}"
            ) from None

    return read


def refuse_unheard(args: argparse.Namespace, heard_by: Mapping[str, Sequence[str]], chosen: str, named: str) -> None:
    """Raises ValueError for an option, None where it was not given, that speaks to other choices than the ``chosen`` one.
    ``named``: what stands before a choice."""
    for option, choices in heard_by.items():
        if getattr(args, option) is not None and chosen not in choices:
            raise ValueError(
                f"--{option.replace('_', '-')} is given with {named} {chosen}, expected {named} {' or '.join(choices)}. Leave one of "
                "them out."
            )


def check_chart(chart: Path, option: str, results: Path) -> Path:
    """The file that ``option`` names for a chart of ``results``. Raises ValueError where it cannot be written, or would take
    the place of measurements."""
    if chart.suffix != ".svg":
        raise ValueError(f"{option} is {quoted(str(chart), 120)}, but must end in .svg. Choose such a name.")
    if os.path.realpath(chart) == os.path.realpath(results):
        raise ValueError(f"{option} is {quoted(str(chart), 120)}, the file of the results. Choose another name.")
    return check_writable_file(chart)


seed_number = count(0, MAX_TORCH_SEED)
