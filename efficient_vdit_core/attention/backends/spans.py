"""Ranges of a tensor, taken out and put back, and rows that kernels can read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int]  # first, last + 1


def take(x: Tensor, spans: Sequence[Span], dim: int) -> Tensor:
    """The ranges ``spans`` of ``x`` along ``dim``, one after another; a view where there is one range."""
    if len(spans) == 1:
        return x.narrow(dim, spans[0][0], spans[0][1] - spans[0][0])
    return torch.cat([x.narrow(dim, 0, 0), *(x.narrow(dim, start, stop - start) for start, stop in spans)], dim=dim)


def put(out: Tensor, spans: Sequence[Span], part: Tensor, dim: int) -> None:
    """Write ``part`` into the ranges ``spans`` of ``out`` along ``dim``: the inverse of ``take``."""
    done = 0
    for start, stop in spans:
        out.narrow(dim, start, stop - start).copy_(part.narrow(dim, done, stop - start))
        done += stop - start


def in_rows(x: Tensor) -> Tensor:
    """x, copied where its channels stand apart: kernels read whole rows."""
    return x if x.stride(-1) == 1 else x.contiguous()
