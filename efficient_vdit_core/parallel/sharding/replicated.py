"""What all ranks compute alike from their own parts: a tensor joined of them, and sums over them.

Every rank then goes on with the same numbers, to the same loss. The objective is the sum of the ranks' losses, which is
``comm.size`` times that of one: so the gradient of a part is the sum over the ranks of what each makes of it, and since
these are the same, ``comm.size`` times a rank's own. Nothing is sent on the way back. The mean over the ranks of the
weights' gradients, which data parallel training takes anyway, is then the gradient of one loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.backends.spans import Span
from .communicator import Communicator, form

JOIN = "gather of results"


def joined(part: Tensor, shares: Sequence[Span], dim: int, comm: Communicator) -> Tensor:
    """The whole along ``dim`` from every rank's ``part``, rank r's being ``shares[r]`` of it; the shares cover it in
    order."""
    return _Joined.apply(part, tuple(shares), dim, comm)  # pyright: ignore[reportReturnType]


def sum_over_ranks(value: Tensor, comm: Communicator) -> Tensor:
    """The sum of every rank's ``value``, in its place; no gradient passes."""
    there = value.cpu() if comm.through_host else value
    dist.all_reduce(there, group=comm.group)
    return value.copy_(there)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shares: tuple[Span, ...], dim: int, comm: Communicator) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.share, ctx.dim, ctx.ranks = shares[comm.rank], dim, comm.size
        forms = [[form(part, dim, stop - start)] for start, stop in shares]
        return torch.cat([parts[0] for parts in comm.gather(JOIN, [part], forms)], dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        start, stop = ctx.share
        return grad.narrow(ctx.dim, start, stop - start) * ctx.ranks, None, None, None
