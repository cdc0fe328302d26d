"""Looks at each self-attention over the video of a dense run, on its live q, k, v, and leaves the run as it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..attention import TokenLayout
from ..attention.dense_call import Override
from ..attention.hook.attention_call import AttentionCall, override_by
from .calls import layout_of_call, place_of_call

# The layer, q, k, v and the dense result, all (B, H, N, D), and where the video stands.
Watch = Callable[[int, Tensor, Tensor, Tensor, Tensor, TokenLayout], None]


def make_watching_override(watch: Watch) -> Override:
    """An override that hands each self-attention over the video to ``watch`` and returns the dense result."""

    def answer(call: AttentionCall) -> Tensor:
        layout, _ = layout_of_call(call)
        place = place_of_call(call)[0] if layout is not None else None
        out = call.dense()
        if layout is not None and place is not None:
            watch(place.layer, *call.take(), call.given(out), layout)
        return out

    return override_by(answer)
