"""Which attention calls of a forward pass a search looks at, and to which layer they belong."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention import TokenLayout
from ..attention.padding import without_padding
from ..attention.reasons import why_no_pattern, why_not_the_video
from ..attention.state import ForwardState


def layer_of_call(state: ForwardState | None, options: dict[str, Any], heads: int) -> tuple[int | None, str]:
    """The layer of a self-attention over ``heads`` of the video, counted on, or None and the reason why it is none."""
    layer = state.next_layer(options, heads) if state else None
    return layer, "" if layer is not None else "beyond the last layer"


def layout_of_call(
    state: ForwardState | None, q: Tensor, k: Tensor, mask: Tensor | None, skip_reshape: bool
) -> tuple[TokenLayout | None, str]:
    """Where the video stands in a plain self-attention over several frames, or None and the reason why it is no such
    call.

    Masked padding is left out of the layout.

    q and k are (B, H, N, D) with ``skip_reshape``, else (B, N, H * D).
    """
    reason = why_not_the_video(state, q.shape, k.shape, mask, skip_reshape)
    if state is None or state.layout is None or reason:
        return None, reason
    reason = why_no_pattern(state, state.layout, mask)
    return (None, reason) if reason else (without_padding(state.layout, state.masked(mask)), "")
