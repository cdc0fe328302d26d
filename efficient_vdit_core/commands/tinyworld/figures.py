"""The figures of a command that judges clip after clip: on the screen, and in the file of ``--json``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...storage.json_text import json_text
from ...storage.rows_file import RowsFile
from .. import say
from ..command_line import command_line
from ..results import results_file

# Seconds between two writes of the figures so far, for what no process hears of before it ends.
KEPT_EVERY = 60.0


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there; of the clips before Ctrl-C, to FILE.part"
    )


class Figures:
    """What a command finds, while its clips are judged and in the end.

    results: where it is kept. about: stands before it. bar: shows how many clips are judged.
    """

    def __init__(self, results: RowsFile, about: dict[str, Any], bar: Any) -> None:
        self.results, self.about, self.bar = results, {"command": command_line(), **about}, bar
        self._so_far: Callable[[], dict[str, Any]] | None = None
        self._kept_at = time.monotonic()

    def judged(self, so_far: Callable[[], dict[str, Any]]) -> None:
        """One more clip is judged; ``so_far`` tells the figures of all of them."""
        self._so_far = so_far
        self.bar.update()
        if time.monotonic() - self._kept_at >= KEPT_EVERY:
            self.results.keep({**self.about, **so_far()})
            self._kept_at = time.monotonic()

    def finish(self, found: dict[str, Any]) -> None:
        """Keeps and says what all clips have given."""
        self.bar.close()
        found = {**self.about, **found}
        self.results.finish(found)
        self._so_far = None
        _say(found, complete=True)

    def end_early(self) -> None:
        """Keeps what the clips so far have given, where there are any; says it where it is kept nowhere."""
        self.bar.close()
        if not self._so_far:
            return
        found = {**self.about, **self._so_far()}
        self.results.keep(found)
        if not self.results.kept:
            _say(found, complete=False)


@contextmanager
def figures_file(file: Path | None, clips: int, about: dict[str, Any] | None = None) -> Iterator[Figures]:
    """For a command that judges so many clips. What ends it early costs no clip that was judged. Raises ValueError, before the
    work, where the figures could not be written."""
    from tqdm import tqdm

    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    with results_file(file, "figures") as results:
        figures = Figures(results, about or {}, tqdm(total=clips, desc="clips"))
        try:
            yield figures
        except BaseException:
            figures.end_early()
            raise


def _say(found: dict[str, Any], complete: bool) -> None:
    say(json_text({**found, "complete": complete}, indent=2).rstrip())
