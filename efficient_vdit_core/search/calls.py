"""Which attention calls of a forward pass a search looks at, and to which layer they belong."""

from __future__ import annotations

from typing import NamedTuple

from ..attention import TokenLayout
from ..attention.hook.attention_call import AttentionCall
from ..attention.hook.padding import without_padding
from ..attention.hook.reasons import why_no_pattern, why_not_the_video
from ..attention.hook.state import CallPlace
from ..attention.report.reason_names import BEYOND_THE_LAYERS


class SeenCall(NamedTuple):
    """A self-attention over the video: where it stands in its forward, where the video stands once the masked ``padding`` is
    left out, and those tokens."""

    place: CallPlace
    layout: TokenLayout
    padding: range


def seen_call(call: AttentionCall) -> SeenCall | str:
    """A plain self-attention over several frames, counted on, or the reason why it is no such call or of no layer."""
    video = video_of_call(call)
    if isinstance(video, str):
        return video
    place = place_of_call(call)
    return SeenCall(place, *video) if place is not None else BEYOND_THE_LAYERS


def video_of_call(call: AttentionCall) -> tuple[TokenLayout, range] | str:
    """The layout and the padding of a `SeenCall`, or the reason why it is none; nothing is counted."""
    state, reason = call.state, why_not_the_video(call)
    if state is None or state.layout is None or reason:
        return reason
    padding = state.masked(call.mask)
    return why_no_pattern(state, state.layout, call.mask) or (without_padding(state.layout, padding), padding)


def place_of_call(call: AttentionCall) -> CallPlace | None:
    """Where a self-attention over the video stands in its forward, counted on; None where it is of no layer."""
    return call.state.next_call(call.options, call.heads) if call.state else None
