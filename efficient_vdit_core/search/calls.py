"""Which attention calls of a forward pass a search looks at, and to which layer they belong."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention.override import ForwardState, _layer


def layer_of_call(
    state: ForwardState | None, q: Tensor, k: Tensor, mask: Tensor | None, skip_reshape: bool, options: dict[str, Any]
) -> tuple[int | None, str]:
    """The layer of a self-attention over the video, counted on by one, or None and the reason why it is none.

    q and k are (B, H, N, D) with ``skip_reshape``, else (B, N, H * D).
    """
    reason = why_not_measured(state, q, k, mask, skip_reshape)
    if state is None or reason:
        return None, reason
    layer = _layer(state, options)
    return (None, "beyond the last layer") if layer is None else (layer, "")


def why_not_measured(state: ForwardState | None, q: Tensor, k: Tensor, mask: Tensor | None, skip_reshape: bool) -> str:
    """The reason why this is no plain self-attention over a video of several frames; an empty text where it is."""
    if state is None:
        return "no token grid"
    if k.shape != q.shape:
        return "cross-attention"
    if state.layout is None:
        return state.reason
    if q.shape[2 if skip_reshape else 1] != state.layout.tokens:
        return "another sequence length"
    if state.layout.grid.t == 1:
        return "a single frame"
    if mask is not None:
        return "masked"
    return "" if state.active else state.reason
