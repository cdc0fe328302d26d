"""A partial result merged into another, in place: out and lse become those over the keys of both.

Shapes: rows (X, H, S, D) of any strides, their lse (X, H, S), natural logarithm.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .gpu import triton_status

_ROWS = 16  # of one program


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges ``part`` (X, H, S, D) with its lse (X, H, S) into ``out`` and ``lse``: both are over disjoint keys, and
    none of their rows is without any.

    out + (part - out) w, where w = sigmoid(part_lse - lse) is the share of the part's keys. On a GPU by one kernel that
    passes over the memory once, elsewhere and while torch.compile traces by PyTorch's operations.
    """
    if _fused(out, part):
        _merge_fused(out, lse, part, part_lse)
        return
    share = torch.sigmoid(part_lse - lse)[..., None]
    if out.dtype == share.dtype:
        out.lerp_(part, share)
    else:  # a share in half precision would be off by as much as the result's last bit
        out.copy_(torch.lerp(out.to(share.dtype), part.to(share.dtype), share))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _fused(out: Tensor, part: Tensor) -> bool:
    if not out.is_cuda or torch.compiler.is_compiling() or out.dtype == torch.float64:
        return False
    return out.stride(-1) == 1 and part.stride(-1) == 1 and triton_status(out.device)[0]


def _merge_fused(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    from . import merge_kernels

    kernel: Any = merge_kernels.merge_kernel
    entries, heads, tokens, dim = out.shape
    programs = (-(-tokens // _ROWS), entries * heads)
    strides = [x.stride()[:3] for x in (out, lse, part, part_lse)]
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernel[programs](out, lse, part, part_lse, heads, tokens, *strides, **block_sizes(dim))


def block_sizes(dim: int) -> dict[str, Any]:
    """What the kernel is built for: head_dim, the next power of two, and the rows of a program."""
    return {"DIM": dim, "WIDTH": 1 << (dim - 1).bit_length(), "ROWS": _ROWS}
