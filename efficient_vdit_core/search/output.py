"""Computes a forward again with one layer under each candidate, to see what each does to the network's own output.

An attention's error says little of that: on the tiny model the same error of the first layer moves the output five times as much
where it comes of mean frames. A forward for each layer and candidate makes a search by so many times longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_torch, write_torch
from .probe import OUTPUT, ProbeRecord, Replay, flat, relative_error

SAVE_EVERY = 60.0  # seconds; a process that is killed loses as much
Around = Callable[[Callable[[], Tensor]], Tensor]


def once(forward: Callable[[], Tensor]) -> Tensor:
    """Computes a forward as it is."""
    return forward()


class KeptErrors:
    """Errors in the order in which a search measures them, kept in a file: one that was stopped goes on where it was.

    As a context it writes the file at its end, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.told, self.saved = path, 0, time.monotonic()
        kept = read_torch(path, "Delete it; they are measured anew.") if path.is_file() else torch.zeros(0)
        self.errors: list[float] = kept.tolist()

    def __enter__(self) -> KeptErrors:
        return self

    def __exit__(self, *_: object) -> None:
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


def measure_output(
    record: ProbeRecord,
    forward: Callable[[], Tensor],
    progress: Callable[[int], None] | None = None,
    kept: KeptErrors | None = None,
) -> Tensor:
    """``forward()``, and into ``record`` the error of each other one, but for those that are ``kept`` of an earlier run.

    ``forward`` must run with ``make_probe_override(record)`` and count its layers anew each time. ``progress`` is told the
    layer before each; what it raises ends the run.
    """
    exact = forward()

    def measure() -> float:
        record.replaying = Replay(pattern, layer)
        try:
            approximate = forward()
        finally:
            record.replaying = None
        return relative_error(flat(approximate), flat(exact))

    for layer in record.layers:
        for pattern in record.candidates:
            if progress is not None:
                progress(layer)
            record.add(OUTPUT, layer, pattern, kept.next(measure) if kept else measure())
    return exact
