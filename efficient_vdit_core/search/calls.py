"""Which attention calls of a forward pass a search looks at, and to which layer they belong."""

from __future__ import annotations

from ..attention import TokenLayout
from ..attention.hook.attention_call import AttentionCall
from ..attention.hook.padding import without_padding
from ..attention.hook.reasons import why_no_pattern, why_not_the_video
from ..attention.hook.state import CallPlace
from ..attention.report.reason_names import BEYOND_THE_LAYERS


def place_of_call(call: AttentionCall) -> tuple[CallPlace | None, str]:
    """Where a self-attention over the video stands in its forward, counted on, or None and the reason why it is of no
    layer."""
    place = call.state.next_call(call.options, call.heads) if call.state else None
    return place, "" if place is not None else BEYOND_THE_LAYERS


def layout_of_call(call: AttentionCall) -> tuple[TokenLayout | None, str]:
    """Where the video stands in a plain self-attention over several frames, or None and the reason why it is no such
    call. Masked padding is left out of the layout."""
    state, reason = call.state, why_not_the_video(call)
    if state is None or state.layout is None or reason:
        return None, reason
    reason = why_no_pattern(state, state.layout, call.mask)
    return (None, reason) if reason else (without_padding(state.layout, state.masked(call.mask)), "")
