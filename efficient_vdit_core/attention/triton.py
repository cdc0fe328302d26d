"""The tile mask in one fused Triton kernel, forward and backward: no copies, no padding, frames of any length.

Shapes: B batch, H heads, N tokens, D head_dim, T frames, S tokens a frame.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tiles import TilePattern
from .gpu import arrow_kernels_status
from .layout import TokenLayout, check_tensors, global_spans

# Each head_dim as two tiles, powers of two: nothing is padded.
HEAD_DIMS = {32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
DTYPES = (torch.bfloat16, torch.float16)  # float32 would spill kilobytes a thread; the interpreter takes it, for tests
# Block sizes under the interpreter: small, so that small tests meet whole and broken blocks.
INTERPRETER_BLOCKS = {"ROWS": 16, "COLS": 32, "MASKED": False}


def attend_triton(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``, scaled by 1 / sqrt(D). Exact and differentiable.

    Any strides, bf16 or fp16, head_dim 32, 48, 64, 80, 96 or 128. Raises ValueError naming the argument that does
    not fit, or the reason why the kernel does not run here.
    """
    return attend_triton_lse(q, k, v, layout, pattern)[0]


def attend_triton_lse(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern
) -> tuple[Tensor, Tensor]:
    """As ``attend_triton``, with the logarithm of each row's softmax sum: (B, H, N) float32, natural log,
    differentiable.

    Partial results over disjoint keys merge by it (sequence parallelism).
    """
    _check(q, k, v, layout)
    return _ArrowAttention.apply(_addressable(q), _addressable(k), _addressable(v), layout, pattern)


def _addressable(x: Tensor) -> Tensor:
    """x, copied where its channels stand apart, which would be read one by one, or a block of 128 tokens spans 2^31
    elements: inside a block the kernels count in 32 bits."""
    return x.contiguous() if x.stride(3) != 1 or 256 * x.stride(2) >= 2**31 else x


class _ArrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern
    ) -> tuple[Tensor, Tensor]:
        from .arrow_kernels import forward_kernel

        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        tables = index_tables(layout, pattern, q.device)
        strides = [x.stride() for x in (q, k, v, out)]
        references = len(pattern.reference_frames(layout.grid.t))
        _launch(forward_kernel, (q, k, v, out, lse, *tables, *strides), q, layout, references)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.tables, ctx.references = layout, tables, references
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        from .arrow_kernels import key_value_gradient_kernel, query_gradient_kernel

        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else _addressable(dout)
        dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        slope_of_lse = delta if dlse is None else dlse.contiguous()  # not read where WITH_DLSE is False
        strides = [x.stride() for x in (q, k, v, out, dout, dq)]
        _launch(
            query_gradient_kernel,
            (q, k, v, out, lse, dout, slope_of_lse, dq, delta, *ctx.tables, *strides),
            q,
            ctx.layout,
            ctx.references,
            WITH_DLSE=dlse is not None,
        )
        strides = [x.stride() for x in (q, k, v, dout, dk, dv)]
        tensors = (q, k, v, lse, dout, delta, dk, dv, *ctx.tables, *strides)
        _launch(key_value_gradient_kernel, tensors, q, ctx.layout, ctx.references)
        return dq, dk, dv, None, None


def _launch(
    kernel: Any, tensors: tuple[Any, ...], q: Tensor, layout: TokenLayout, references: int, **flags: bool
) -> None:
    """Run ``kernel`` with one program for each block of each head, on q's device."""
    from .arrow_kernels import INTERPRETED

    batch, heads, tokens, dim = q.shape
    grid, first, second = layout.grid, *HEAD_DIMS[dim]

    def programs(chosen: dict[str, int]) -> tuple[int]:
        blocks = [-(-length // chosen["ROWS"]) for length in (layout.prefix, layout.suffix, grid.tokens_per_frame)]
        return (batch * heads * (blocks[0] + blocks[1] + grid.t * blocks[2]),)

    # Tiles are tuned once for each frame size class and, in a process with several cards, for each kind of them.
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    sizes = (
        heads,
        tokens,
        grid.t,
        references,
        grid.tokens_per_frame,
        layout.prefix,
        layout.suffix,
        grid.tokens_per_frame.bit_length() + 64 * (10 * major + minor),
    )
    scale = math.log2(math.e) / math.sqrt(dim)
    # Triton 3.10 turns the fusion of multiply-adds off by default, which the online softmax counts on.
    options = INTERPRETER_BLOCKS if INTERPRETED else {"enable_fp_fusion": True}
    # Triton launches on the current GPU, which need not be the tensors'.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernel[programs](*tensors, *sizes, scale, **flags, D0=first, D1=second, **options)


@functools.lru_cache(maxsize=64)
def index_tables(layout: TokenLayout, pattern: TilePattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """``units`` and ``segments`` as ``arrow_kernels`` describes them; cached, so that a layer costs no upload."""
    frames = layout.grid.t
    references = pattern.reference_frames(frames)
    segments = [(0, layout.tokens)]  # the first one, all tokens, is what prefix, suffix and reference frames see
    units = [(0, layout.prefix, 0, 1), (layout.tokens - layout.suffix, layout.tokens, 0, 1)]
    units += [(*layout.span(f, f + 1), 0, 1) for f in references]
    for f, near in pattern.neighbours(frames).items():
        # The global spans, the frame and its neighbours, joined where they touch.
        seen = global_spans(layout, tuple(sorted((*references, *near))))
        units.append((*layout.span(f, f + 1), len(segments), len(segments) + len(seen)))
        segments += seen
    with torch.inference_mode(False):  # a table made in inference mode could not serve a training step later
        return torch.tensor(units, dtype=torch.int32, device=device), torch.tensor(
            segments, dtype=torch.int32, device=device
        )


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
    check_tensors(q, k, v, layout)
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"q has head_dim {q.shape[3]}, expected one of {', '.join(map(str, HEAD_DIMS))} for the triton backend. "
            "Choose the frames backend, which takes any."
        )
    available, reason = arrow_kernels_status(q.device)
    if not available:
        raise ValueError(f"The triton backend does not run here: {reason}. Choose the frames backend.")
    from .arrow_kernels import INTERPRETED

    if q.dtype not in DTYPES and not (INTERPRETED and q.dtype == torch.float32):
        raise ValueError(f"q is {q.dtype}, expected bfloat16 or float16 for the triton backend. Choose auto or frames.")
