"""A partial result merged into another, in place: out and lse become those over the keys of both.

Shapes: rows (X, H, S, D) of any strides, their lse (X, H, S), natural logarithm.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from ..gpu import is_out_of_memory, triton_status

_ROWS = 16  # of one program
_COPIED = 2**22  # numbers of the result that PyTorch's operations hold in float32 at a time: 16 MiB of each tensor

log = logging.getLogger("efficient_vdit")
_RUNS: dict[torch.device, bool] = {}  # whether the kernel does, by device


def merge_into(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, first: tuple[Tensor, Tensor] | None = None
) -> None:
    """Merges ``part`` (X, H, S, D) with its lse (X, H, S) into ``out`` and ``lse``: both are over disjoint keys, and
    none of their rows is without any. With ``first``, a result and its lse, that is what ``part`` is merged with, and
    ``out`` and ``lse`` are only written.

    out + (part - out) w, where w = sigmoid(part_lse - lse) is the share of the part's keys. On a GPU by one kernel that
    passes over the memory once, elsewhere and while torch.compile traces by PyTorch's operations. Of halves those hold
    three float32 copies of some rows of one entry of X, while torch.compile traces of all of them.
    """
    fused = _RUNS.get(out.device) and not torch.compiler.is_compiling()
    if fused and all(x.stride(-1) == 1 for x in (out, part, first[0] if first else out)):
        _merge_fused(out, lse, part, part_lse, first or (out, lse))
        return
    if first:
        out.copy_(first[0])
        lse.copy_(first[1])
    share = torch.sigmoid(part_lse - lse)[..., None]
    if out.dtype == share.dtype:
        out.lerp_(part, share)
    else:
        _merge_halves(out, part, share)
    lse.copy_(torch.logaddexp(lse, part_lse))


def _merge_halves(out: Tensor, part: Tensor, share: Tensor) -> None:
    """In the share's precision, float32: in half precision it would be off by as much as the result's last bit."""
    _, heads, tokens, dim = out.shape
    step = tokens if torch.compiler.is_compiling() else max(1, _COPIED // (heads * dim))
    for entry in zip(out, part, share, strict=True):
        for rows, added, of_rows in zip(*(x.split(step, dim=1) for x in entry), strict=True):
            rows.copy_(torch.lerp(rows.to(share.dtype), added.to(share.dtype), of_rows))


def prepare_merge(device: torch.device) -> None:
    """Tries the kernel on a few rows, once for each device: it is built there, which needs a C compiler."""
    if device in _RUNS or device.type != "cuda":
        return
    available, reason = triton_status(device)
    _RUNS[device] = available
    if available:
        try:
            rows, logs = torch.zeros(2, 1, 1, 3, 8, device=device), torch.zeros(2, 1, 1, 3, device=device)
            _merge_fused(rows[0], logs[0], rows[1], logs[1], (rows[0], logs[0]))
        except Exception as error:  # compilers raise anything
            if is_out_of_memory(error):  # says nothing about the kernel: the next run asks again
                del _RUNS[device]
                return
            _RUNS[device], reason = False, f"{type(error).__name__}: {error}"
    if not _RUNS[device]:
        log.info("Efficient-vDiT: parts are merged by PyTorch's operations: %s", reason)


def _merge_fused(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, first: tuple[Tensor, Tensor]) -> None:
    from . import merge_kernels

    kernel: Any = merge_kernels.merge_kernel
    entries, heads, tokens, dim = out.shape
    programs = (-(-tokens // _ROWS), entries * heads)
    tensors = (out, lse, *first, part, part_lse)
    strides = [x.stride()[:3] for x in tensors]
    options = {"enable_fp_fusion": True} if out.is_cuda else {}  # the interpreter has none
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernel[programs](*tensors, heads, tokens, *strides, **block_sizes(dim), **options)


def block_sizes(dim: int) -> dict[str, Any]:
    """What the kernel is built for: head_dim, the next power of two, and the rows of a program."""
    return {"DIM": dim, "WIDTH": 1 << (dim - 1).bit_length(), "ROWS": _ROWS}
