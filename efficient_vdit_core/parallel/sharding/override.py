"""The attention override of a sharded forward: a block's self-attention goes over the ranks, the rest stays local."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor

from .blocks import ALL_KEYS, SELF, SHARDED_KEY, ShardedForward

Override = Callable[..., Tensor]


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
        def dense(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **shape: bool) -> Tensor:
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, attn_precision=attn_precision, **shape, **kwargs)
            return func(q, k, v, heads, mask=mask, attn_precision=attn_precision, **shape, **kwargs)

        state: ShardedForward | None = (kwargs.get("transformer_options") or {}).get(SHARDED_KEY)
        if state is None or not state.awaits:
            return dense(q, k, v, heads, mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        awaited, state.awaits = state.awaits, ""
        _check(state, awaited, q, k, heads, mask)
        if not skip_reshape:
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        if awaited == ALL_KEYS:
            out = state.attend_to_all(q, k, v)
        else:
            # Ulysses holds a part of the heads, so the local calls say how many; RB's partial results need no backend.
            out = state.attend(
                q, k, v, lambda q, k, v: dense(q, k, v, q.shape[1], None, skip_reshape=True, skip_output_reshape=True)
            )
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
