"""Taking ranges out of a tensor and putting them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Span


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
