"""The one entry to attention under a tile pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan.head_patterns import LayerPattern
from ..tiles import TilePattern
from .autocast import autocast
from .backends import flex, triton
from .backends.frames import Dense
from .backends.head_calls import Call, calls_of
from .backends.mean_frames import make_tables
from .backends.merge import prepare_merge
from .backends.registry import check_backend, check_means
from .backends.spans import put, take
from .call_shape import CallShape
from .dense_call import name_of
from .layout import TokenLayout, check_tensors, result_like, spans_of
from .selection import ANY_PARTIAL, attend_functions, choose_backend, partial_for, partial_for_means


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pattern: LayerPattern,
    *,
    dense: Dense | None = None,
    backend: str | Mapping[TilePattern, str] = "auto",
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Attention of q over k, v under the tile mask of ``pattern`` (Efficient-vDiT section 3). Exact and differentiable.

    Args:
        q, k, v: (B, H, N, D) with N = ``layout.tokens``, any float dtype and strides, under autocast cast as PyTorch's
            attention does; scores are scaled by 1 / sqrt(D).
        pattern: one for all heads, or one for each of the H heads: those that are alike are computed together, under
            ``flex`` and ``triton`` all that they compute.
        dense: plain attention of (B, H, Nq, D) over (B, H, Nk, D), default PyTorch's SDPA. Its ``name``, where it has one,
            tells it from others, or the function's own name.
        backend: one of ``BACKENDS``; ``auto`` is the fastest of them, as ``choose_backend`` measures it; ``dense`` ignores the
            pattern. One for all heads, or by pattern.
        max_extra_bytes: bounds the copies of ``frames`` and the unmerged results of ``parts``, default: by the device.

    Returns:
        (B, H, N, D).

    Raises:
        ValueError: an argument does not fit, the backend cannot run here, or an argument requires a gradient and the
            backend or ``dense`` gives none; the text names it and says why.
    """
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v, layout)
    dense = dense or F.scaled_dot_product_attention
    attend = attend_functions(dense, max_extra_bytes)

    def named(pattern: TilePattern, shape: CallShape) -> str:
        chosen = backend if isinstance(backend, str) else backend[pattern]
        if chosen == "auto":
            chosen = choose_backend(shape, layout, pattern, dense=dense, or_dense=False)
        elif pattern.means:
            check_means(chosen)
        elif chosen not in ("dense", "frames"):  # these run everywhere
            check_backend(chosen, q.device)
        return "dense" if pattern.is_full(layout.grid.t) else chosen

    def attended(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend[call.backend](q, k, v, layout, call.pattern)
        _check_gradient(out, {"q": q, "k": k, "v": v}, call.backend, dense)
        return out

    shapes = group_shapes(CallShape.of(q, k, v), pattern)
    calls = calls_of(pattern, q.shape[1], {p: named(p, shape) for p, shape in shapes.items()}, layout.grid.t)
    if len(calls) == 1:
        return attended(calls[0], q, k, v)
    out = result_like(q)
    for call in calls:
        heads = spans_of(call.heads)
        put(out, heads, attended(call, *(take(x, heads, 1) for x in (q, k, v))), 1)
    return out


def describe_call(call: Call, shape: CallShape, dense: Dense | None) -> str:
    """What computes a call, for a person. ``shape`` is that of the layer's calls, of all heads."""
    if call.backend in ("dense", "frames"):
        return name_of(dense)
    if call.backend != "parts":
        return call.backend
    of_call = replace(shape, heads=len(call.heads))
    means = any(kind.means for kind in call.pattern.kinds)
    falls_back = means and dense is not None and partial_for_means(dense, of_call) is ANY_PARTIAL
    return f"{ANY_PARTIAL.name if falls_back else name_of(dense)} in parts"


def group_shapes(shape: CallShape, pattern: LayerPattern) -> dict[TilePattern, CallShape]:
    """The shape of the calls of each group of heads that ``tile_attention`` makes of a call."""
    return {p: replace(shape, heads=len(heads)) for p, heads in pattern.head_groups(shape.heads).items()}


def make_ready(call: Call, shape: CallShape, layout: TokenLayout, dense: Dense) -> None:
    """Makes the index tables that a call's backend keeps on the device, and tries the kernels that it may call, so that no
    call has to. ``shape`` is that of the layer's calls, of all heads."""
    shape = replace(shape, heads=len(call.heads))
    if call.backend == "triton":
        triton.make_ready(shape, layout, call.pattern)
    elif call.backend == "flex":
        kernel = flex.kernel_of(shape.device, shape.dtype, shape.head_dim, differ=len(call.pattern.kinds) > 1)
        for pattern in call.pattern.kinds:
            flex.block_mask(layout, pattern, shape.device, kernel.rows, kernel.columns)
    elif call.backend == "parts":
        partial_for(dense, shape)
        prepare_merge(shape.device)
        for pattern in call.pattern.kinds:
            make_tables(pattern, layout, shape.device, shape.dtype)


def _check_gradient(out: Tensor, tensors: dict[str, Tensor], backend: str, dense: Dense) -> None:
    """A dense function without a backward would end the graph here, and training would go on without these
    gradients."""
    wanting = [name for name, x in tensors.items() if x.requires_grad]
    if wanting and torch.is_grad_enabled() and not out.requires_grad:
        used = f"{backend} with {name_of(dense)}" if backend in ("dense", "frames") else backend
        raise ValueError(
            f"{wanting[0]} requires a gradient, and the backend {used} gives none. "
            "Hand in a dense function with a backward, or call it under torch.no_grad()."
        )
