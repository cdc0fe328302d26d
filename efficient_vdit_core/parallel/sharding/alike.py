"""What all ranks compute alike from their own parts: a tensor joined of them, and sums over them.

Every rank then goes on with the same numbers, to the same loss. The objective is the sum of the ranks' losses, which is
``wire.size`` times that of one: so the gradient of a part is the sum over the ranks of what each makes of it, and since
these are the same, ``wire.size`` times a rank's own. Nothing is sent on the way back. The mean over the ranks of the
weights' gradients, which data parallel training takes anyway, is then the gradient of one loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.spans import Span
from .wire import Wire, form

JOIN = "gather of results"


def joined(part: Tensor, shares: Sequence[Span], dim: int, wire: Wire) -> Tensor:
    """The whole along ``dim`` from every rank's ``part``, rank r's being ``shares[r]`` of it; the shares cover it in
    order."""
    return _Joined.apply(part, tuple(shares), dim, wire)  # pyright: ignore[reportReturnType]


def sum_over_ranks(value: Tensor, wire: Wire) -> Tensor:
    """The sum of every rank's ``value``, in its place; no gradient passes."""
    there = value.cpu() if wire.through_host else value
    dist.all_reduce(there, group=wire.group)
    return value.copy_(there)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shares: tuple[Span, ...], dim: int, wire: Wire) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.share, ctx.dim, ctx.ranks = shares[wire.rank], dim, wire.size
        forms = [[form(part, dim, stop - start)] for start, stop in shares]
        return torch.cat([parts[0] for parts in wire.gather(JOIN, [part], forms)], dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        start, stop = ctx.share
        return slope.narrow(ctx.dim, start, stop - start) * ctx.ranks, None, None, None
