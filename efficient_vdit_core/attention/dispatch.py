"""The one entry to attention under a tile pattern, and the choice of the backend that computes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan.head_patterns import LayerPattern
from ..tiles import TilePattern
from .autocast import autocast
from .autotune.choose import default_book
from .autotune.trial import Attend, Choice
from .backends import flex, triton
from .backends.frames import Dense, attend_frames
from .backends.head_calls import Call, calls_of
from .backends.mean_frames import make_tables
from .backends.merge import prepare_merge
from .backends.partial import PartialAttention, attend_backward, attend_lse, computes_precisely, partial_of
from .backends.parts import attend_parts
from .backends.spans import put, take
from .call_shape import CallShape
from .dense_call import function_code, function_name
from .gpu import arrow_kernels_status, is_recording
from .layout import TokenLayout, check_tensors, result_like, spans_of

log = logging.getLogger("efficient_vdit")

BACKENDS = ("frames", "triton", "flex", "parts")
# For mean frames, beside a dense attention that does not tell its log-sum-exp; runs wherever PyTorch does.
_ANY_PARTIAL = PartialAttention("PyTorch's attention", attend_lse, attend_backward)
# Where FlexAttention, which compiles for seconds, is left out of trials without gradients: on an H200 (capability 9.0) it
# took 1.2 to 1.5 times as long as the fused kernel in every one of 23 calls, bfloat16 (bench/results/h200).
_FLEX_LOSES, _FLEX_LOSES_AT = (9, 0), (96, 128)
# Attention over fewer tokens takes a millisecond or two either way: the plan is followed as it is, unmeasured.
FEWEST_MEASURED_TOKENS = 2048


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend runs on this machine, and if not, why."""

    name: str
    available: bool
    reason: str


def available_backends(device: torch.device | str | None = None) -> list[BackendStatus]:
    """The backends of ``tile_attention`` on ``device`` (default: the GPU where there is one), for `evdit doctor`."""
    chosen = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames = BackendStatus("frames", True, "dense calls only; runs wherever PyTorch does")
    return [
        frames,
        BackendStatus("triton", *arrow_kernels_status(chosen)),
        BackendStatus("flex", *flex.flex_status(chosen)),
        _parts_status(chosen),
    ]


def _parts_status(device: torch.device) -> BackendStatus:
    if device.type not in ("cpu", "cuda"):
        return BackendStatus("parts", False, f"PyTorch's attention on {device.type} does not tell its log-sum-exp")
    return BackendStatus("parts", True, "dense calls over views, merged by their log-sum-exp")


@lru_cache
def _statuses(device: torch.device) -> dict[str, BackendStatus]:
    return {status.name: status for status in available_backends(device)}


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
    attend = _candidates(dense, max_extra_bytes)

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


def simplest_backend(pattern: TilePattern) -> str:
    """The backend that computes the pattern on any device without a trial: ``frames``, or ``parts`` for mean frames, whose
    counts go into the log-sum-exp."""
    return "parts" if pattern.means else "frames"


def unmeasured_backend(shape: CallShape, pattern: TilePattern, dense: Dense | None = None) -> str:
    """What computes calls of this shape where no trial could be made: the simplest backend, and in training ``parts`` where
    it runs, as ``frames`` keeps copies for the way back."""
    dense = dense or F.scaled_dot_product_attention
    trains = shape.gradients and _statuses(shape.device)["parts"].available and fits("parts", shape, dense)
    return "parts" if trains else simplest_backend(pattern)


def name_of(dense: Dense | None) -> str:
    """What to call a dense attention; None is PyTorch's."""
    if dense is None or dense is F.scaled_dot_product_attention:
        return "sdpa"
    return getattr(dense, "name", "") or function_name(dense)


def identity_of(dense: Dense | None) -> str:
    """What tells a dense attention from others where backends are measured beside it."""
    if dense is None or dense is F.scaled_dot_product_attention:
        return "sdpa"
    return getattr(dense, "identity", "") or f"{name_of(dense)} {function_code(dense)}".strip()


def describe_call(call: Call, shape: CallShape, dense: Dense | None) -> str:
    """What computes a call, for a person. ``shape`` is that of the layer's calls, of all heads."""
    if call.backend in ("dense", "frames"):
        return name_of(dense)
    if call.backend != "parts":
        return call.backend
    of_call = replace(shape, heads=len(call.heads))
    means = any(kind.means for kind in call.pattern.kinds)
    falls_back = means and dense is not None and partial_for_means(dense, of_call) is _ANY_PARTIAL
    return f"{_ANY_PARTIAL.name if falls_back else name_of(dense)} in parts"


def check_means(backend: str) -> None:
    """Raise ValueError where the named backend cannot compute mean frames."""
    if backend not in ("auto", "dense", "parts"):
        raise ValueError(f"backend is {backend!r}, which computes no mean frames. Choose auto or parts.")


def choose_backend(
    shape: CallShape,
    layout: TokenLayout,
    pattern: TilePattern,
    *,
    dense: Dense | None = None,
    or_dense: bool = True,
) -> str:
    """The backend that ``auto`` means for calls of this shape: the fastest of a trial, ``dense`` where nothing beats it.

    Without ``or_dense`` it is the fastest that follows the pattern.
    """
    choice = measured_choice(shape, layout, pattern, dense=dense)
    return choice.backend if or_dense else choice.sparse()


def measured_choice(
    shape: CallShape,
    layout: TokenLayout,
    pattern: TilePattern,
    *,
    dense: Dense | None = None,
) -> Choice:
    """The fastest backend for calls of this shape, and the times of all of them.

    Not measured, and the simplest, for fewer than ``FEWEST_MEASURED_TOKENS`` tokens, while torch.compile traces and while a
    CUDA graph is recorded; nor where a trial finds no memory. A full pattern is ``dense``. The choice then has no times.
    """
    if pattern.is_full(layout.grid.t):
        return Choice("dense", {})
    traced = torch.compiler.is_compiling() or is_recording(shape.device)
    if layout.tokens < FEWEST_MEASURED_TOKENS or traced:
        return Choice(simplest_backend(pattern), {})
    candidates, otherwise = backend_candidates(shape, dense, pattern), unmeasured_backend(shape, pattern, dense)
    return default_book().choose(candidates, shape, layout, pattern, identity_of(dense), otherwise)


def forget_cramped() -> None:
    """Trials that found too little memory are made again where they are asked for next: a run is over."""
    default_book().forget_cramped()


def backend_candidates(
    shape: CallShape, dense: Dense | None = None, pattern: TilePattern | None = None
) -> dict[str, Attend]:
    """``dense``, and the backends that are worth a trial for calls of this shape, None: under a pattern without means."""
    dense = dense or F.scaled_dot_product_attention
    every = _candidates(dense, None)
    usable = {n for n, s in _statuses(shape.device).items() if s.available and fits(n, shape, dense)}
    if "triton" in usable and _flex_loses(shape):
        usable -= {"flex"}
    if pattern is not None and pattern.means:
        usable = {simplest_backend(pattern)}
    return {name: attend for name, attend in every.items() if name == "dense" or name in usable}


def _flex_loses(shape: CallShape) -> bool:
    """Whether it was measured to, beside the fused kernel. AMD's capabilities are other cards."""
    if shape.gradients or shape.dtype != torch.bfloat16 or shape.head_dim not in _FLEX_LOSES_AT or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(shape.device) == _FLEX_LOSES


def group_shapes(shape: CallShape, pattern: LayerPattern) -> dict[TilePattern, CallShape]:
    """The shape of the calls of each group of heads that ``tile_attention`` makes of a call."""
    return {p: replace(shape, heads=len(heads)) for p, heads in pattern.head_groups(shape.heads).items()}


def fits(backend: str, shape: CallShape, dense: Dense = F.scaled_dot_product_attention) -> bool:
    """Whether it is worth trying a backend that runs on this machine on calls of this shape, beside ``dense``."""
    on_gpu = shape.device.type == "cuda"
    if backend == "frames":
        return True
    if backend == "parts":
        partial = partial_for(dense, shape)
        return partial is not None and (partial.backward is not None or not shape.gradients)
    # Triton's interpreter runs on a CPU too, but only to test the kernel.
    if backend == "triton":
        return on_gpu and shape.head_dim in triton.HEAD_DIMS and shape.dtype in triton.DTYPES
    return on_gpu and shape.dtype in flex.DTYPES


def partial_for(dense: Dense, shape: CallShape) -> PartialAttention | None:
    """What ``parts`` makes its calls with in place of ``dense``, for calls of this shape; None where nothing tells the
    log-sum-exp of what ``dense`` computes. It is tried once and kept."""
    function = getattr(dense, "function", dense)
    if function is None:
        return None
    if getattr(dense, "precise", False) and computes_precisely(function):
        function = F.scaled_dot_product_attention
    return partial_of(function, shape.device, shape.dtype, shape.head_dim)


def partial_for_means(dense: Dense, shape: CallShape) -> PartialAttention:
    """The same for mean frames, which have no other backend: PyTorch's attention where ``dense`` does not tell its
    log-sum-exp, or has no backward where one is wanted."""
    found = partial_for(dense, shape)
    return _ANY_PARTIAL if found is None or (shape.gradients and found.backward is None) else found


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


def _candidates(dense: Dense, max_extra_bytes: int | None) -> dict[str, Attend]:
    def parts(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern) -> Tensor:
        shape = CallShape.of(q, k, v)
        partial = partial_for_means(dense, shape) if pattern.means else partial_for(dense, shape)
        prepare_merge(q.device)
        if partial is None:
            raise ValueError(
                f"backend is 'parts', and the dense attention {name_of(dense)} does not tell its log-sum-exp for {q.dtype} of "
                f"head_dim {q.shape[3]}. Choose auto or frames."
            )
        return attend_parts(q, k, v, layout, pattern, partial, max_extra_bytes)

    return {
        "dense": lambda q, k, v, layout, pattern: dense(q, k, v),
        "frames": lambda q, k, v, layout, pattern: attend_frames(q, k, v, layout, pattern, dense, max_extra_bytes),
        "triton": triton.attend_triton,
        "flex": flex.attend_flex,
        "parts": parts,
    }


def check_backend(backend: str, device: torch.device | str) -> None:
    """Raise ValueError where the named backend is unknown, or cannot run on ``device``: the text says why."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}, expected auto, dense, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}. Choose auto."
        )
    status = _statuses(torch.device(device))[backend]
    if not status.available:
        raise ValueError(f"backend is {backend!r}, which cannot run here: {status.reason}. Choose auto or frames.")


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
