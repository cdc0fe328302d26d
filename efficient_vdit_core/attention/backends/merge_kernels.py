"""Triton kernel that merges two partial attention results: both are read once and their merge is written, which may be in
place of the first.

Imported only where Triton is installed. Shapes: rows (X, H, S, D), their lse (X, H, S). Strides are (X, H, S) in
elements, channels stand one behind another; addresses are 64-bit.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _start(tensor, strides, entry, head):
    return tensor + tl.cast(entry, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def merge_kernel(
    out, lse, first, first_lse, part, part_lse, heads, tokens,
    out_strides, lse_strides, first_strides, first_lse_strides, part_strides, part_lse_strides,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head: first + (part - first) w with w = 1 / (1 + exp(first_lse - part_lse)), and the lse of both."""
    entry, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    first_lse_at = _start(first_lse, first_lse_strides, entry, head) + rows * first_lse_strides[2]
    part_lse_at = _start(part_lse, part_lse_strides, entry, head) + rows * part_lse_strides[2]
    ours = tl.load(first_lse_at, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(part_lse_at, mask=inside, other=0.0).to(tl.float32)
    top = tl.maximum(ours, theirs)
    of_ours, of_theirs = tl.exp(ours - top), tl.exp(theirs - top)
    share = of_theirs / (of_ours + of_theirs)

    channels = tl.arange(0, WIDTH)[None, :]
    there = inside[:, None] & (channels < DIM)
    first_at = _start(first, first_strides, entry, head) + rows[:, None] * first_strides[2] + channels
    part_at = _start(part, part_strides, entry, head) + rows[:, None] * part_strides[2] + channels
    before = tl.load(first_at, mask=there, other=0.0).to(tl.float32)
    added = tl.load(part_at, mask=there, other=0.0).to(tl.float32)
    merged = before + (added - before) * share[:, None]
    out_at = _start(out, out_strides, entry, head) + rows[:, None] * out_strides[2] + channels
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=there)
    lse_at = _start(lse, lse_strides, entry, head) + rows * lse_strides[2]
    tl.store(lse_at, top + tl.log(of_ours + of_theirs), mask=inside)
