"""The attention override of a sharded forward: a block's self-attention goes over the ranks, the rest stays local."""

from __future__ import annotations

from torch import Tensor

from ...attention.dense_call import Override
from ...attention.hook.attention_call import AttentionCall, override_by
from .blocks import ALL_KEYS, SELF, SHARDED_KEY, ShardedForward


def make_sharded_override(previous: Override | None = None) -> Override:
    """For ``transformer_options["optimized_attention_override"]``; ``previous`` is another node's, asked for what is
    dense."""

    def answer(call: AttentionCall) -> Tensor:
        state: ShardedForward | None = call.options.get(SHARDED_KEY)
        if state is None or not state.awaits:
            return call.dense()
        awaited, state.awaits = state.awaits, ""
        _check(state, awaited, call)
        # Ulysses holds a part of the heads, for which it calls the dense attention; RB's partial results need no backend.
        qkv = call.take()
        return call.give(state.attend_to_all(*qkv) if awaited == ALL_KEYS else state.attend(*qkv, call.asked))

    return override_by(answer, previous)


def _check(state: ShardedForward, awaited: str, call: AttentionCall) -> None:
    what = ""
    if call.mask is not None or (awaited == SELF and call.crosses):
        what = "masks its attention or joins text to it, expected plain attention over the video tokens"
    elif awaited == SELF and 0 < call.heads < state.heads:
        what = f"attends with {call.heads} of its {state.heads} heads at a time, expected all at once"
    if what:
        raise ValueError(f"Block {state.layer} {what}: this cannot be sharded. Bypass EVDiTSequenceParallel.")
