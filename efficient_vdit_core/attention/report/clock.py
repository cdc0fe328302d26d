"""Time spent in self-attention over the video, without making the device wait."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..gpu import is_recording

SPARSE, DENSE = "sparse", "dense"
MOST_PENDING = 4096  # CUDA events kept before finished ones are read

Key = tuple[str, tuple[int, ...]]  # SPARSE or DENSE, and the shape of q


@dataclass
class Tally:
    """Calls of one kind and shape: their number, seconds, and summed density (share of dense FLOPs, 1 for dense
    ones)."""

    calls: int = 0
    seconds: float = 0.0
    density: float = 0.0


@dataclass(frozen=True)
class Times:
    """Seconds in self-attention over the video, and what it would take dense.

    ``measured``: the estimate rests on dense calls of the same shapes in the same run, else on FLOPs for some.
    """

    sparse: float
    dense: float
    all_dense: float
    measured: bool


@dataclass
class AttentionClock:
    """Takes the time of calls, safe for several threads. On a GPU by events, which are read at the end."""

    tallies: dict[Key, Tally] = field(default_factory=lambda: defaultdict(Tally))
    pending: deque[tuple[Key, torch.device, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)
    # By device: an event belongs to the one that it was first recorded on.
    spare: dict[torch.device, list[torch.cuda.Event]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def reserve(self, device: torch.device, calls: int) -> None:
        """Makes the events that ``calls`` calls take, so that none is made among the model's own work."""
        if device.type != "cuda":
            return
        with torch.cuda.device(device), self.lock:
            while len(self.spare[device]) < 2 * calls:
                event = torch.cuda.Event(enable_timing=True)
                event.record()  # the driver's part of an event is made by its first use
                self.spare[device].append(event)

    def _event(self, device: torch.device) -> torch.cuda.Event:
        with self.lock:
            return self.spare[device].pop() if self.spare[device] else torch.cuda.Event(enable_timing=True)

    @contextmanager
    def taking(self, kind: str, q: Tensor, density: float = 1.0) -> Iterator[None]:
        """Within it runs one attention of ``kind`` with queries like q. On devices other than CPU and CUDA, only
        counted."""
        key = (kind, tuple(q.shape))
        with self.lock:
            self.tallies[key].calls += 1
            self.tallies[key].density += density
        if q.is_cuda and not is_recording(q.device):
            stream = torch.cuda.current_stream(q.device)
            start, end = self._event(q.device), self._event(q.device)
            start.record(stream)
            yield
            end.record(stream)
            with self.lock:
                self.pending.append((key, q.device, start, end))
                self._read(wait=len(self.pending) > MOST_PENDING, most=2)
        elif q.device.type == "cpu":
            begin = time.perf_counter()
            yield
            with self.lock:
                self.tallies[key].seconds += time.perf_counter() - begin
        else:
            yield

    def reset(self) -> None:
        with self.lock:
            self.tallies.clear()
            self.pending.clear()

    def times(self) -> Times | None:
        """The run's seconds, or None where none could be taken."""
        with self.lock:
            self._read(wait=True, most=len(self.pending))
            tallies = dict(self.tallies)
        spent = {kind: sum(t.seconds for key, t in tallies.items() if key[0] == kind) for kind in (SPARSE, DENSE)}
        estimate, measured = spent[DENSE], True
        for (kind, shape), tally in tallies.items():
            if kind == SPARSE:
                like = tallies.get((DENSE, shape))
                measured = measured and like is not None
                estimate += (
                    like.seconds / like.calls * tally.calls if like else tally.seconds * tally.calls / tally.density
                )
        return Times(spent[SPARSE], spent[DENSE], estimate, measured) if any(spent.values()) else None

    def _read(self, *, wait: bool, most: int) -> None:
        """Adds up to ``most`` of the oldest events; those that the device has not reached yet only with ``wait``."""
        for _ in range(min(most, len(self.pending))):
            key, device, start, end = self.pending[0]
            if not wait and not end.query():
                return
            end.synchronize()
            self.tallies[key].seconds += start.elapsed_time(end) / 1000.0
            self.pending.popleft()
            self.spare[device] += (start, end)
