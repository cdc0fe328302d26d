"""A results file whose rows are measured one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import check_writable_file, write_text
from .json_text import json_text


class RowsFile:
    """JSON of what there is to say about the rows, whether they are complete, and the rows, where there are any beside the rest.
    Until they are they stand in FILE.part: what ends the work early costs no row that it has, and no older results. A number
    that is not finite becomes null.

    file: None keeps nothing. part: that of rows so far, or None. kept: whether rows of this run stand there.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.part = file, file and file.with_name(f"{file.name}.part")
        self.kept = False

    def check(self) -> None:
        """Raises ValueError, before the work, where the file or its part could not be written."""
        for file in filter(None, (self.file, self.part)):
            check_writable_file(file)

    def keep(self, about: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> None:
        """The rows so far."""
        if self.part:
            write_text(self.part, _text(about, rows, complete=False))
            self.kept = True

    def finish(self, about: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> None:
        """All rows: they take the place of older ones, and the part goes."""
        if self.file and self.part:
            write_text(self.file, _text(about, rows, complete=True))
            self.part.unlink(missing_ok=True)
            self.kept = False


def _text(about: dict[str, Any], rows: list[dict[str, Any]] | None, complete: bool) -> str:
    return json_text({**about, "complete": complete} | ({} if rows is None else {"rows": rows}), indent=1)
