"""Which attention calls of a forward pass a search looks at, and to which layer they belong."""

from __future__ import annotations

from ..attention import TokenLayout
from ..attention.hook.attention_call import AttentionCall
from ..attention.hook.padding import without_padding
from ..attention.hook.reasons import why_no_pattern, why_not_the_video
from ..attention.report.reason_names import BEYOND_THE_LAYERS


def layer_of_call(call: AttentionCall) -> tuple[int | None, str]:
    """The layer of a self-attention over the video, counted on, or None and the reason why it is none."""
    layer = call.state.next_layer(call.options, call.heads) if call.state else None
    return layer, "" if layer is not None else BEYOND_THE_LAYERS


def layout_of_call(call: AttentionCall) -> tuple[TokenLayout | None, str]:
    """Where the video stands in a plain self-attention over several frames, or None and the reason why it is no such
    call. Masked padding is left out of the layout."""
    state, reason = call.state, why_not_the_video(call)
    if state is None or state.layout is None or reason:
        return None, reason
    reason = why_no_pattern(state, state.layout, call.mask)
    return (None, reason) if reason else (without_padding(state.layout, state.masked(call.mask)), "")
