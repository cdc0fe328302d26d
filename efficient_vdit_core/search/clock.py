"""Takes the times of a probing run's attention calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..attention import TokenLayout, choose_backend, tile_attention
from ..attention.backends.head_calls import MANY_PATTERNS
from ..attention.backends.spans import put, take
from ..attention.call_shape import CallShape
from ..attention.dense_call import DenseCall
from ..attention.layout import spans_of
from ..tiles import TilePattern
from ..timing import timed
from .record import DENSE, ProbeRecord

Out = TypeVar("Out")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CallClock:
    """Takes the times of one call of ``layer`` into ``record``, where that is timed."""

    record: ProbeRecord
    layer: int
    layout: TokenLayout
    dense: DenseCall

    def time_dense(self, query: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` gives, the call as it was asked for."""
        return self._time(DENSE, "dense", query, run)

    def time_dense_part(self, qkv: Sequence[Tensor]) -> None:
        self._time_part(DENSE, "dense", qkv, self.dense)

    def time_candidate(self, pattern: TilePattern, qkv: Sequence[Tensor]) -> None:
        """Takes the time of the backend that a run would choose; where that is dense attention, dense attention's time."""
        if not self.record.timed:
            return
        backend = choose_backend(CallShape.of(qkv[0]), self.layout, pattern, dense=self.dense)
        if backend == "dense":
            self.record.add_seconds(self.layer, pattern, self.record.seconds[self.layer, DENSE][-1])
            return
        attend = partial(tile_attention, layout=self.layout, pattern=pattern, dense=self.dense, backend=backend)
        self._time(pattern, backend, qkv[0], lambda: attend(*qkv))
        if backend not in MANY_PATTERNS:  # these take all groups in one call
            self._time_part(pattern, backend, qkv, attend)

    def _time(self, pattern: TilePattern | None, backend: str, like: Tensor, run: Callable[[], Tensor]) -> Tensor:
        if not self.record.timed:
            return run()
        out, seconds = self._take_time((backend, pattern, like.shape, like.dtype), like.device, run)
        self.record.add_seconds(self.layer, pattern, seconds)
        return out

    def _time_part(self, pattern: TilePattern | None, backend: str, qkv: Sequence[Tensor], attend: Attend) -> None:
        """Takes the time of every second head, gathered and put back as a group that stands apart is."""
        heads = spans_of(range(0, qkv[0].shape[1], 2))
        share = len(heads) / qkv[0].shape[1]
        if not (self.record.timed and self.record.by_head) or share == 1:
            return
        out = torch.empty_like(qkv[0])

        def attend_a_part() -> None:
            q, k, v = (take(x, heads, 1) for x in qkv)
            put(out, heads, attend(q, k, v), 1)

        _, seconds = self._take_time(("part", backend, pattern, out.shape, out.dtype), out.device, attend_a_part)
        self.record.add_part(self.layer, pattern, share, seconds)

    def _take_time(self, kind: Hashable, device: torch.device, run: Callable[[], Out]) -> tuple[Out, float]:
        """What ``run`` gives, and its seconds. The first of a kind is made once before, as it may have to compile: its layer
        would pay for all of them."""
        if kind not in self.record.ran:
            run()
            self.record.ran.add(kind)
        return timed(run, device)
