"""What a search by the model's output has measured, so that one that was stopped goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...storage.files import read_torch, write_torch

SAVE_EVERY = 60.0  # seconds; a process that is killed loses as much


class KeptErrors:
    """Errors in the order in which a search measures them, kept in a file: one that was stopped goes on where it was.

    As a context it writes the file at its end, however it ends, unless there is nothing to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.told, self.saved = path, 0, time.monotonic()
        kept = read_torch(path, "Delete it; they are measured anew.") if path.is_file() else torch.zeros(0)
        self.errors: list[float] = kept.tolist()

    def __enter__(self) -> KeptErrors:
        return self

    def __exit__(self, *_: object) -> None:
        if self.errors:
            self._save()

    def next(self, measure: Callable[[], float]) -> float:
        """The next one, which is measured where it is not kept."""
        if self.told == len(self.errors):
            self.errors.append(measure())
            if time.monotonic() > self.saved + SAVE_EVERY:
                self._save()
        self.told += 1
        return self.errors[self.told - 1]

    def _save(self) -> None:
        write_torch(self.path, torch.tensor(self.errors, dtype=torch.float64))
        self.saved = time.monotonic()
