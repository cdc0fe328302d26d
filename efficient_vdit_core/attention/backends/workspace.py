"""How much memory beyond its output a backend takes for copies, and for results that it has not put together yet."""

from __future__ import annotations

from torch import Tensor

# What fits a CPU core's share of the last-level cache: chunks beyond it wait for memory, and fresh pages cost more than
# the attention of a small frame.
_CPU_BYTES = 4 * 2**20
# Elsewhere as much as the output: a block's feed-forward holds more than that beside its input. A quarter of it cuts the
# calls so small that the last round of blocks leaves much of a GPU idle: up to 0.16 of the time on an H200 by the model of
# bench/rounds.py (what was measured there, bench/results/h200, is of a quarter). A training step, which has no memory to
# spare and larger calls in its backward, keeps to a quarter.
# Never by the memory that is free at the moment: the same call must allocate the same at every step.
_LEAST_BYTES = 64 * 2**20
_TRAINING_SHARE = 4


def default_extra_bytes(q: Tensor, frame_bytes: int, *, gradients: bool = False) -> int:
    """The bound on copies (bytes) where the caller gives none, for queries like q (B, H, N, D), ``gradients`` being wanted
    or not.

    ``frame_bytes`` is one frame's worth of all heads, which a CPU takes at once.
    """
    if q.device.type == "cpu":
        return max(_CPU_BYTES, frame_bytes)
    return max(_LEAST_BYTES, q.numel() * q.element_size() // (_TRAINING_SHARE if gradients else 1))
