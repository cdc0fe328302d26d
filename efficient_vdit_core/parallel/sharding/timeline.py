"""How long a layer's attention takes on a rank whose exchanges run beside its work, in the order of the code.

A rank has one line of work and one link; what it sends goes one after the other, and each piece of work waits for what
it needs. Neither slows the other down: an assumption, for copies take a little of a GPU's arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from .traffic import RbBytes
from .ulysses import GROUPS


@dataclass
class Timeline:
    """One rank's clock, in seconds; ``link``: bytes a second that it sends."""

    link: float
    now: float = 0.0
    link_free: float = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def send(self, nbytes: float) -> float:
        """Start an exchange; when it will have ended."""
        self.link_free = max(self.link_free, self.now) + nbytes / self.link
        return self.link_free

    def wait(self, ends: float) -> None:
        self.now = max(self.now, ends)


@dataclass(frozen=True)
class RbWork:
    """Seconds of a rank's pieces of RB: frames to themselves, shared rows to its keys, its frames to the shared keys."""

    own: float
    rows: float
    shared: float


def rb_seconds(work: RbWork, sent: RbBytes, link: float) -> float:
    """As ``reference_broadcast.attended`` runs; where there is a halo all of ``own`` waits for it, whole frames too."""
    line = Timeline(link)
    queries, halo, keys = line.send(sent.queries), line.send(sent.halo), line.send(sent.keys)
    line.wait(halo if sent.halo else 0.0)
    line.work(work.own)
    line.wait(queries)
    line.work(work.rows)
    rows = line.send(sent.rows)
    line.wait(keys)
    line.work(work.shared)
    line.wait(rows)
    return line.now


def ulysses_seconds(work: float, to_heads: float, to_tokens: float, link: float) -> float:
    """As ``ulysses.ulysses_attention`` runs: ``work`` seconds in groups of heads, each with its part of the bytes."""
    line = Timeline(link)
    coming = [line.send(to_heads / GROUPS) for _ in range(GROUPS)]
    back = []
    for ends in coming:
        line.wait(ends)
        line.work(work / GROUPS)
        back.append(line.send(to_tokens / GROUPS))
    line.wait(max(back))
    return line.now
