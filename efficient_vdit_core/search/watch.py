"""Looks at each self-attention over the video of a dense run, on its live q, k, v, and leaves the run as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..attention import TokenLayout
from ..attention.dense_call import DenseCall
from ..attention.padding import as_heads
from ..attention.state import FORWARD_KEY, ForwardState, Override
from .calls import layer_of_call, layout_of_call

# The layer, q, k, v and the dense result, all (B, H, N, D), and where the video stands.
Watch = Callable[[int, Tensor, Tensor, Tensor, Tensor, TokenLayout], None]


def make_watching_override(watch: Watch) -> Override:
    """An override that hands each self-attention over the video to ``watch`` and returns the dense result."""

    def override(
        func: Override,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        options = kwargs.get("transformer_options") or {}
        state: ForwardState | None = options.get(FORWARD_KEY)
        layout, _ = layout_of_call(state, q, k, mask, skip_reshape)
        layer = layer_of_call(state, options, heads)[0] if layout is not None else None
        dense = DenseCall(func, None, attn_precision, kwargs)
        out = dense.call(q, k, v, heads, mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        if layout is not None and layer is not None:
            qh, kh, vh = (as_heads(x, heads, skip_reshape) for x in (q, k, v))
            watch(layer, qh, kh, vh, as_heads(out, heads, skip_output_reshape), layout)
        return out

    return override
