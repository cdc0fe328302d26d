"""A results file whose rows are measured one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import check_writable_file, write_text


class RowsFile:
    """JSON of what there is to say about the rows, whether they are complete, and the rows. Until they are they stand in FILE.part:
    what ends the work early costs no row that it has, and no older results.

    file: None keeps nothing. part: that of rows so far, or None. kept: whether rows of this run stand there.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.part = file, file and file.with_name(f"{file.name}.part")
        self.kept = False

    def check(self) -> None:
        """Raises ValueError, before the work, where the file or its part could not be written."""
        for file in filter(None, (self.file, self.part)):
            check_writable_file(file)

    def keep(self, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """The rows so far."""
        if self.part:
            write_text(self.part, _text(about, rows, complete=False))
            self.kept = True

    def finish(self, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """All rows: they take the place of older ones, and the part goes."""
        if self.file and self.part:
            write_text(self.file, _text(about, rows, complete=True))
            self.part.unlink(missing_ok=True)
            self.kept = False


def _text(about: dict[str, Any], rows: list[dict[str, Any]], complete: bool) -> str:
    return json.dumps({**about, "complete": complete, "rows": rows}, indent=1) + "\n"
