"""The tile mask in one fused Triton kernel, forward and backward: no copies, no padding, frames of any length.

Shapes: B batch, H heads, N tokens, D head_dim, T frames, S tokens a frame.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from ..call_shape import CallShape
from ..gpu import OUT_OF_MEMORY, arrow_kernels_status, is_recording, one_out_of_memory
from ..layout import TokenLayout, check_tensors, global_spans

log = logging.getLogger("efficient_vdit")

# Each head_dim as two tiles, powers of two: nothing is padded.
HEAD_DIMS = {32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
DTYPES = (torch.bfloat16, torch.float16)  # float32 would spill kilobytes a thread; the interpreter takes it, for tests
_TUNED: set[tuple[Any, ...]] = set()  # kinds of calls whose tiles were chosen before a run
# Block sizes under the interpreter: small, so that small tests meet whole and broken blocks.
INTERPRETER_BLOCKS = {"ROWS": 16, "COLS": 32, "MASKED": False}


def attend_triton(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: LayerPattern) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``, scaled by 1 / sqrt(D), in one launch also where heads differ.
    Exact and differentiable.

    Any strides, bf16 or fp16, head_dim 32, 48, 64, 80, 96 or 128. Raises ValueError naming the argument that does
    not fit, or the reason why the kernel does not run here.
    """
    return attend_triton_lse(q, k, v, layout, pattern)[0]


def attend_triton_lse(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: LayerPattern
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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: LayerPattern
    ) -> tuple[Tensor, Tensor]:
        from .arrow_kernels import forward_kernel

        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        tables = index_tables(layout, pattern, q.shape[1], q.device)
        strides = [x.stride() for x in (q, k, v, out)]
        _launch(forward_kernel, (q, k, v, out, lse, *tables, *strides), q, layout)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.tables = layout, tables
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
        dlse_or_delta = delta if dlse is None else dlse.contiguous()  # not read where WITH_DLSE is False
        strides = [x.stride() for x in (q, k, v, out, dout, dq)]
        _launch(
            query_gradient_kernel,
            (q, k, v, out, lse, dout, dlse_or_delta, dq, delta, *ctx.tables, *strides),
            q,
            ctx.layout,
            WITH_DLSE=dlse is not None,
        )
        strides = [x.stride() for x in (q, k, v, dout, dk, dv)]
        tensors = (q, k, v, lse, dout, delta, dk, dv, *ctx.tables, *strides)
        _launch(key_value_gradient_kernel, tensors, q, ctx.layout)
        return dq, dk, dv, None, None


def _launch(kernel: Any, tensors: tuple[Any, ...], q: Tensor, layout: TokenLayout, **flags: bool) -> None:
    """Run ``kernel`` with one program for each block of each head, on q's device."""
    from .arrow_kernels import INTERPRETED

    batch, heads, tokens, dim = q.shape
    grid, first, second = layout.grid, *HEAD_DIMS[dim]

    def programs(chosen: dict[str, int]) -> tuple[int]:
        blocks = [-(-length // chosen["ROWS"]) for length in (layout.prefix, layout.suffix, grid.tokens_per_frame)]
        return (batch * heads * (blocks[0] + blocks[1] + grid.t * blocks[2]),)

    sizes = (batch, heads, tokens, grid.tokens_per_frame, layout.prefix, layout.suffix, _size_class(layout, q.device))
    scale = math.log2(math.e) / math.sqrt(dim)
    # Triton 3.10 turns the fusion of multiply-adds off by default, which the online softmax counts on.
    options = INTERPRETER_BLOCKS if INTERPRETED else {"enable_fp_fusion": True}
    # Triton launches on the current GPU, which need not be the tensors'.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernel[programs](*tensors, *sizes, scale, **flags, D0=first, D1=second, **options)


def _size_class(layout: TokenLayout, device: torch.device) -> int:
    """Tiles are tuned once for each: frames within a factor of two and, in a process with several cards, each kind of
    them."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return layout.grid.tokens_per_frame.bit_length() + 64 * (10 * major + minor)


def make_ready(shape: CallShape, layout: TokenLayout, pattern: LayerPattern) -> None:
    """Uploads the tables of such calls, and has the tiles tuned for them where no call was: that times kernels and waits for
    them, and must not be left to a block that may be recorded."""
    index_tables(layout, pattern, shape.heads, shape.device)
    if shape.device.type == "cuda" and not is_recording(shape.device):
        about = torch.cuda.get_device_properties(shape.device)
        _tune(shape, layout, pattern.kinds[0], about.multi_processor_count)


def _tune(shape: CallShape, layout: TokenLayout, pattern: TilePattern, multiprocessors: int) -> None:
    """One call like those of ``shape``, of so many heads that the blocks of one frame, which run longest where it is a
    reference frame, keep all multiprocessors at work four times."""
    kind = (shape.device, shape.dtype, shape.head_dim, _size_class(layout, shape.device), shape.gradients)
    if kind in _TUNED:
        return
    _TUNED.add(kind)
    blocks = math.ceil(layout.grid.tokens_per_frame / 128)
    heads = min(shape.heads, math.ceil(4 * multiprocessors / blocks))
    try:
        with one_out_of_memory(), torch.inference_mode(False), torch.set_grad_enabled(shape.gradients):
            tensors = replace(shape, batch=1).tensors(heads, layout.tokens)
            out = attend_triton(*tensors, layout, pattern)
            if shape.gradients:
                torch.autograd.grad(out, tensors, out.detach())
    except OUT_OF_MEMORY:
        log.info("Efficient-vDiT: there is no room to tune the fused kernel before the run; its first call does.")


# A call of 40 heads over 33 frames takes 20 KB; plans by head have a pattern for each layer.
@functools.lru_cache(maxsize=256)
def index_tables(
    layout: TokenLayout, pattern: LayerPattern, heads: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """``spans``, ``key_ranges`` and ``schedule`` as ``arrow_kernels`` describes them, for calls of so many heads; cached, so that
    a layer costs no upload. Raises ValueError where the pattern is for another number of heads."""
    frames, every = layout.grid.t, (0, 1)
    key_ranges = [(0, layout.tokens)]  # the first one, all tokens, is what prefix, suffix and reference frames see
    spans = [(0, layout.prefix, *every), (layout.tokens - layout.suffix, layout.tokens, *every)]
    schedule = []
    for alike, members in pattern.head_groups(heads).items():
        references, neighbours, first = alike.reference_frames(frames), alike.neighbours(frames), len(spans)
        for frame in range(frames):
            seen = every
            if frame in neighbours:
                # The global spans, the frame and its neighbours, joined where they touch.
                seen_spans = global_spans(layout, tuple(sorted((*references, *neighbours[frame]))))
                seen = (len(key_ranges), len(key_ranges) + len(seen_spans))
                key_ranges += seen_spans
            spans.append((*layout.span(frame, frame + 1), *seen))
        schedule += [(head, span) for head in members for span in range(first, len(spans))]
    seen_tokens = [sum(end - start for start, end in key_ranges[first:last]) for _, _, first, last in spans]
    schedule.sort(key=lambda entry: (-seen_tokens[entry[1]], entry))
    with torch.inference_mode(False):  # a table made in inference mode could not serve a training step later
        spans_, key_ranges_, schedule_ = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in (spans, key_ranges, schedule)
        )
    return spans_, key_ranges_, schedule_


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
