"""Attention of short sequences in bfloat16 on a CPU where its gradient is asked for: matrix products over a few entries of the
batch at a time, whose scores stay in the cache.

PyTorch's own spends most of its time in the gradient there. On a core with AVX-512 BF16, result and gradient together take two
fifths of its time at the tiny models' 96 tokens, and two thirds at their 384.

Shapes: q (B, H, Nq, D), k and v (B, H, Nk, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast, autocast_dtype

# Scores at a time, in elements: 1 MiB, of which the gradient has three.
_SCORES = 2**19
# Scores of one entry of the batch, in elements, up to which this is for.
_LONGEST = 2**22


def suits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether this is the faster way, and gives all gradients that are asked for: a mask gets none."""
    if mask is not None and mask.requires_grad:
        return False
    if q.device.type != "cpu" or autocast_dtype(q) != torch.bfloat16 or q.shape[1] * q.shape[2] * k.shape[2] > _LONGEST:
        return False
    return torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As ``scaled_dot_product_attention``: a ``mask`` is added, or where it is boolean says what is seen, and broadcasts to
    (B, H, Nq, Nk)."""
    q, k, v = (x.contiguous() for x in autocast(q, k, v))
    added = None
    if mask is not None:
        added = (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
        added = added.to(q.dtype).expand(torch.broadcast_shapes(added.shape, (len(q), 1, 1, 1)))
    with torch.autocast("cpu", enabled=False):  # which has its softmax in float32
        return _Attention.apply(q, k, v, added)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        for part in _parts(q, k):
            out[part] = _weights(q, k, added, part) @ v[part]
        ctx.save_for_backward(q, k, v, added, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, added, out = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        of_rows = (out.float() * dout.float()).sum(-1, keepdim=True).to(q.dtype)
        for part in _parts(q, k):
            p = _weights(q, k, added, part)
            dv[part] = p.transpose(-1, -2) @ dout[part]
            ds = (dout[part] @ v[part].transpose(-1, -2)).sub_(of_rows[part]).mul_(p)
            dq[part] = (ds @ k[part]) * scale
            dk[part] = (ds.transpose(-1, -2) @ q[part]) * scale
        return dq, dk, dv, None


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Some entries of the batch each."""
    entries = max(1, _SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(first, first + entries) for first in range(0, len(q), entries)]


def _weights(q: Tensor, k: Tensor, added: Tensor | None, part: slice) -> Tensor:
    scores = (q[part] * q.shape[-1] ** -0.5) @ k[part].transpose(-1, -2)
    return (scores if added is None else scores + added[part]).softmax(-1)
