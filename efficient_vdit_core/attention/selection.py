"""Which backend computes calls of a shape: those worth a trial there, and the fastest of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tiles import TilePattern
from .autotune.choose import default_book
from .autotune.trial import Attend, Choice
from .backends import flex, registry, triton
from .backends.frames import Dense, attend_frames
from .backends.merge import prepare_merge
from .backends.partial import PartialAttention, attend_backward, attend_lse, computes_precisely, partial_of
from .backends.parts import attend_parts
from .backends.registry import simplest_backend
from .call_shape import CallShape
from .dense_call import identity_of, name_of
from .gpu import is_recording
from .layout import TokenLayout

# For mean frames, beside a dense attention that does not tell its log-sum-exp; runs wherever PyTorch does.
ANY_PARTIAL = PartialAttention("PyTorch's attention", attend_lse, attend_backward)
# Where FlexAttention, which compiles for seconds, is left out of trials without gradients: on an H200 (capability 9.0) it
# took 1.2 to 1.5 times as long as the fused kernel in every one of 23 calls, bfloat16 (bench/results/h200).
_FLEX_LOSES, _FLEX_LOSES_AT = (9, 0), (96, 128)
# Attention over fewer tokens takes a millisecond or two either way: the plan is followed as it is, unmeasured.
FEWEST_MEASURED_TOKENS = 2048


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
    every = attend_functions(dense, None)
    usable = {n for n, s in registry.statuses_on(shape.device).items() if s.available and fits(n, shape, dense)}
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


def unmeasured_backend(shape: CallShape, pattern: TilePattern, dense: Dense | None = None) -> str:
    """What computes calls of this shape where no trial could be made: the simplest backend, and in training ``parts`` where
    it runs, as ``frames`` keeps copies for the way back."""
    dense = dense or F.scaled_dot_product_attention
    trains = shape.gradients and registry.statuses_on(shape.device)["parts"].available and fits("parts", shape, dense)
    return "parts" if trains else simplest_backend(pattern)


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
    return ANY_PARTIAL if found is None or (shape.gradients and found.backward is None) else found


def attend_functions(dense: Dense, max_extra_bytes: int | None) -> dict[str, Attend]:
    """What computes a call under a pattern, by backend; `tile_attention` says what ``max_extra_bytes`` bounds."""

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
