"""A model of the milliseconds of `parts` on a GPU, without one: the rounds of blocks that its multiprocessors take.

A dense call is a grid of blocks of 128 queries, each of which passes over its keys 128 at a time. The blocks go round
the multiprocessors; the last round is as long as a full one. What a block of 128 x 128 takes comes from one dense call
that was measured. Beside that only the copies and the merges, by the bytes that they move; the host is taken to be quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..attention.backends.parts import schedule_for
from ..tiles import TilePattern
from .attention import Shape

BLOCK = 128
_START = 2.5  # blocks of keys that starting and ending a block of queries takes, fitted
_MOVED, _MERGED = 1.4e9, 3.5e9  # bytes a millisecond of strided copies, and of the merge in one pass


@dataclass(frozen=True)
class Rounds:
    """``processors`` of a GPU that takes ``block_milliseconds`` for a block of queries and keys on each of them."""

    processors: int
    block_milliseconds: float

    @classmethod
    def measured(cls, processors: int, shape: Shape, milliseconds: float) -> Rounds:
        """By the time of dense attention over ``shape``."""
        return cls(processors, milliseconds / cls(processors, 1.0).call(1, shape.heads, *2 * (shape.layout.tokens,)))

    def call(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """Milliseconds of one dense call."""
        rounds = math.ceil(batch * heads * math.ceil(queries / BLOCK) / self.processors)
        return rounds * (math.ceil(keys / BLOCK) + _START) * self.block_milliseconds

    def parts(self, shape: Shape, references: int, extra_bytes: int) -> float:
        """Milliseconds of `parts` that may hold so much beyond its output."""
        layout, size = shape.layout, shape.tokens
        q = torch.empty(1, shape.heads, layout.tokens, shape.head_dim, dtype=getattr(torch, shape.dtype), device="meta")
        schedule = schedule_for(q, layout, TilePattern(references), extra_bytes)
        shared = sum(stop - start for start, stop in schedule.spans)
        total = 0.0
        for part in schedule.heads:
            heads = len(range(*part.indices(shape.heads)))
            row_bytes = heads * shape.head_dim * q.element_size()
            total += self.call(1, heads, shared, layout.tokens) + 8 * shared * row_bytes / _MOVED
            for rows in schedule.rows:
                tokens = (rows.last - rows.first) * size
                total += self.call(1, heads, tokens, shared) + 3 * tokens * row_bytes / _MERGED
                total += sum(self.call(near.count, heads, size, near.width * size) for near in rows.near)
        return total
