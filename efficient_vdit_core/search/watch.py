"""Looks at each self-attention over the video of a dense run, on its live q, k, v, and leaves the run as it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..attention import TokenLayout
from ..attention.dense_call import Override
from ..attention.hook.attention_call import AttentionCall, override_by
from .calls import seen_call

# The layer, q, k, v and the dense result, all (B, H, N, D) without padding, and where the video stands.
Watch = Callable[[int, Tensor, Tensor, Tensor, Tensor, TokenLayout], None]


def make_watching_override(watch: Watch) -> Override:
    """An override that hands each self-attention over the video to ``watch`` and returns the dense result."""

    def answer(call: AttentionCall) -> Tensor:
        seen, out = seen_call(call), call.dense()
        if not isinstance(seen, str):
            watch(seen.place.layer, *call.take(seen.padding), call.given(out, seen.padding), seen.layout)
        return out

    return override_by(answer)
