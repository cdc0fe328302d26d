"""The attention override of a sharded forward: a block's self-attention goes over the ranks, the rest stays local."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ...attention.dense_call import DenseCall
from ...attention.padding import as_heads
from ...attention.state import Override
from .blocks import ALL_KEYS, SELF, SHARDED_KEY, ShardedForward


def make_sharded_override(previous: Override | None = None) -> Override:
    """For ``transformer_options["optimized_attention_override"]``; ``previous`` is another node's, asked for what is
    dense."""

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
        dense = DenseCall(func, previous, attn_precision, kwargs)
        state: ShardedForward | None = (kwargs.get("transformer_options") or {}).get(SHARDED_KEY)
        if state is None or not state.awaits:
            return dense.call(q, k, v, heads, mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        awaited, state.awaits = state.awaits, ""
        _check(state, awaited, q, k, heads, mask)
        q, k, v = (as_heads(x, heads, skip_reshape) for x in (q, k, v))
        # Ulysses holds a part of the heads, for which it calls ``dense``; RB's partial results need no backend.
        out = state.attend_to_all(q, k, v) if awaited == ALL_KEYS else state.attend(q, k, v, dense)
        return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")

    return override


def _check(state: ShardedForward, awaited: str, q: Tensor, k: Tensor, heads: int, mask: Tensor | None) -> None:
    what = ""
    if mask is not None or (awaited == SELF and k.shape != q.shape):
        what = "masks its attention or joins text to it, expected plain attention over the video tokens"
    elif awaited == SELF and 0 < heads < state.heads:
        what = f"attends with {heads} of its {state.heads} heads at a time, expected all at once"
    if what:
        raise ValueError(f"Block {state.layer} {what}: this cannot be sharded. Bypass EVDiTSequenceParallel.")
