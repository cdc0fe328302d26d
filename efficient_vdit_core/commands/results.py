"""The results file of a command that measures row after row, or clip after clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..storage.rows_file import RowsFile
from . import say


@contextmanager
def results_file(file: Path | None, what: str = "rows") -> Iterator[RowsFile]:
    """That of ``--json``, where there is one, while the rows are measured; what ends that early says where they are, ``what``
    they are called. Raises ValueError where it cannot be written."""
    results = RowsFile(file)
    results.check()
    try:
        yield results
    except BaseException:
        if results.kept:
            say(f"{what} so far in {results.part}")
        raise
