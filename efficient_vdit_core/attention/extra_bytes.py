"""How much memory beyond its output a backend takes for copies, and for results that it has not put together yet."""

from __future__ import annotations

from torch import Tensor

# What fits a CPU core's share of the last-level cache: chunks beyond it wait for memory, and fresh pages cost more than
# the attention of a small frame.
_CPU_BYTES = 4 * 2**20
# Elsewhere a share of the output, which dense attention needs too. Never by the memory that is free at the moment: the
# same call must allocate the same at every step.
_SHARE_OF_OUTPUT, _LEAST_BYTES = 4, 64 * 2**20


def default_extra_bytes(q: Tensor, frame_bytes: int) -> int:
    """The bound on copies (bytes) where the caller gives none, for queries like q (B, H, N, D).

    ``frame_bytes`` is one frame's worth of all heads, which a CPU takes at once.
    """
    if q.device.type == "cpu":
        return max(_CPU_BYTES, frame_bytes)
    return max(_LEAST_BYTES, q.numel() * q.element_size() // _SHARE_OF_OUTPUT)
