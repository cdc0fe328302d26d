"""What a search by the model's output has measured, so that one that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ...storage.files import read_torch, write_torch
from ...storage.saving_times import SavingTimes

SAVE_EVERY = 60.0  # seconds


class KeptErrors:
    """Errors in the order in which a search measures them, kept in a file: one that was stopped goes on where it was.

    As a context it writes the file at its end, however it ends, unless there is nothing to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.told, self.times = path, 0, SavingTimes(SAVE_EVERY)
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
            if self.times.due():
                self._save()
        self.told += 1
        return self.errors[self.told - 1]

    def _save(self) -> None:
        with self.times.saving():
            write_torch(self.path, torch.tensor(self.errors, dtype=torch.float64))
