"""The one entry to attention under a tile pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..tiles import TilePattern
from .frames import attend_frames
from .layout import TokenLayout

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]

DEFAULT_MAX_EXTRA_BYTES = 256 * 2**20


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend runs on this machine, and if not, why."""

    name: str
    available: bool
    reason: str


def available_backends() -> list[BackendStatus]:
    """The backends of ``tile_attention``, for `evdit doctor`."""
    return [BackendStatus("frames", True, "dense calls only; runs wherever PyTorch does")]


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pattern: TilePattern,
    *,
    dense: Dense | None = None,
    backend: str = "auto",
    max_extra_bytes: int = DEFAULT_MAX_EXTRA_BYTES,
) -> Tensor:
    """Attention of q over k, v under the arrow mask of ``pattern`` (Efficient-vDiT section 3). Exact and differentiable.

    q, k, v and the result are (B, H, N, D) with N = ``layout.tokens``, any float dtype and strides; scores are scaled by
    1 / sqrt(D). ``dense`` computes plain attention of (B, H, Nq, D) over (B, H, Nk, D), default PyTorch's SDPA.
    ``max_extra_bytes`` bounds the copies of keys and values. Raises ValueError naming the argument that does not fit.
    """
    _check(q, k, v, layout)
    names = [status.name for status in available_backends() if status.available]
    if backend not in ("auto", *names):
        raise ValueError(f"backend is {backend!r}, expected auto or one of {', '.join(names)}, which run on this machine.")
    dense = dense or F.scaled_dot_product_attention
    if pattern.is_full(layout.grid.t):
        return dense(q, k, v)
    return attend_frames(q, k, v, layout, pattern, dense, max_extra_bytes)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
    if q.ndim != 4 or q.shape[2] != layout.tokens:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, expected (batch, heads, {layout.tokens}, head_dim) for {layout}. "
            "The token layout does not describe this sequence."
        )
    if q.numel() == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected no empty dimension.")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(q.shape)} as q has: this is self-attention.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, expected {q.dtype} on {q.device} as q is.")
