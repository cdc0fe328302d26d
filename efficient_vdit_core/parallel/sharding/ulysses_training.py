"""Ulysses with a way back: the swap of tokens for heads and the swap of heads for tokens are each other's gradient.

Attention in between is differentiated as usual: it keeps whole sequences of this rank's heads, as many numbers as its own
tokens of all heads have. All heads go at once: autograd calls the steps one behind another.

Shapes as in ``ulysses``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.backends.spans import take
from .communicator import Communicator
from .layout import Shard
from .ulysses import Inner, joined_heads, start_to_heads, start_to_tokens


@dataclass(frozen=True)
class Swap:
    """Who has which of ``heads`` heads, and which tokens; every rank swaps at the same time."""

    shard: Shard
    heads: int
    comm: Communicator

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The heads of every rank."""
        return self.shard.shares_of(self.heads)

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(B, H, n, D) of this rank's tokens to (B, h, N, D) of its heads."""
        pending = start_to_heads(tensors, self.shard, self.spans, self.comm)
        return joined_heads(tensors, self.shard, self.spans, pending, self.comm)

    def to_tokens(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """(B, h, N, D) of this rank's heads to (B, H, n, D) of its tokens."""
        parts = start_to_tokens(whole, self.shard, self.spans, self.comm).wait()
        parts[self.comm.rank] = [take(x, self.shard.spans[self.comm.rank], 2) for x in whole]
        return [torch.cat(of_heads, dim=1) for of_heads in zip(*parts, strict=True)]


def trained_ulysses(q: Tensor, k: Tensor, v: Tensor, shard: Shard, comm: Communicator, inner: Inner) -> Tensor:
    """``ulysses_attention`` with gradients; ``inner`` must have them too."""
    swap = Swap(shard, q.shape[1], comm)
    start, stop = swap.spans[comm.rank]
    whole_q, whole_k, whole_v = _ToHeads.apply(q, k, v, swap)  # pyright: ignore[reportGeneralTypeIssues]
    done = inner(whole_q, whole_k, whole_v, start) if stop > start else whole_q
    return _ToTokens.apply(done, swap)  # pyright: ignore[reportReturnType]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, swap: Swap) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.swap = swap
        return tuple(swap.to_heads((q, k, v)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.swap.to_tokens(grads), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, done: Tensor, swap: Swap) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.swap = swap
        return swap.to_tokens((done,))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.swap.to_heads((grad,))[0], None
