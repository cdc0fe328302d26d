"""Attention for trainings in bfloat16 on a CPU: matrix products over a few clips at a time, whose scores stay in its cache.

For the tiny models' 96 to 384 tokens, forward and gradient together take a third to a quarter of the time of PyTorch's
``scaled_dot_product_attention`` there, which spends most of it in the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.autocast import autocast

# Scores at a time, in elements: 1 MiB, of which the gradient has three.
_SCORES = 2**19


def cpu_attention(
    dense: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_: Any
) -> Tensor:
    """An attention override (`attention.sdpa.OVERRIDE_KEY`) that computes all that it is handed itself.

    q, k, v: (B, N, heads * D). ``mask``: added to the scores, and broadcast to (B, heads, Nq, Nk). Returns (B, N, heads * D).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for x in autocast(q, k, v))
    added = None if mask is None else mask.to(q.dtype).expand(len(q), -1, -1, -1)
    with torch.autocast("cpu", enabled=False):  # which has its softmax in float32
        out: Tensor = _Attention.apply(q, k, v, added)  # pyright: ignore[reportAssignmentType]
    return out.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """q, k, v: (B, H, N, D)."""

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
    """Some clips of the batch each."""
    clips = max(1, _SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(first, first + clips) for first in range(0, len(q), clips)]


def _weights(q: Tensor, k: Tensor, added: Tensor | None, part: slice) -> Tensor:
    scores = (q[part] * q.shape[-1] ** -0.5) @ k[part].transpose(-1, -2)
    return (scores if added is None else scores + added[part]).softmax(-1)
