"""Measures, inside a running dense model, what each candidate pattern would do to each layer's attention.

Speaks ComfyUI's attention-override protocol, as ``attention.hook.override`` does, and returns the dense result: the run goes
on undisturbed. Only attention is computed again, one candidate after another, so memory is that of a dense run and
one attention output.

What is measured, for each self-attention call and each candidate pattern p:
- the attention error ||A_p - A|| / ||A||: A is the dense output before the output projection, over batch, heads and
  tokens, and A_p the candidate's on the same live q, k, v, always by the pattern's simplest backend, even where dense attention
  would be faster, so that the same run gives the same plan; the inputs are those of the dense run, so errors of earlier
  layers do not add up. In the same pass the part of each head h in it, ||A_p,h - A_h||^2 / ||A||^2.
- with ``blocks.replay_blocks``, the block error ||B_p - B|| / ||B||: B is what the whole block returns, residual and
  feed-forward included.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ..attention import TokenLayout, simplest_backend, tile_attention
from ..attention.dense_call import Override
from ..attention.hook.attention_call import AttentionCall, override_by
from .calls import SeenCall, place_of_call, seen_call, video_of_call
from .clock import CallClock
from .errors import relative_errors
from .record import ATTENTION, ProbeRecord, Replay

Compare = Callable[[Tensor, Tensor], tuple[float, np.ndarray]]  # approximate and exact -> as `relative_errors`


def make_probe_override(
    record: ProbeRecord,
    *,
    progress: Callable[[int], None] | None = None,
    begun: Callable[[TokenLayout], None] | None = None,
    previous: Override | None = None,
    compare: Compare | None = None,
) -> Override:
    """An override for ``transformer_options["optimized_attention_override"]`` that measures into ``record``.

    ``begun`` is told before the first call is measured where the video stands, and ``progress`` the layer after each call over
    the video; what they raise ends the run, and nothing is left behind. ``previous``: another node's override, asked for every
    dense piece. ``compare``: in place of `relative_errors`.
    """
    compare = compare or relative_errors

    def answer(call: AttentionCall) -> Tensor:
        if (replay := record.replaying) is not None:
            return _replayed(call, replay)
        seen = seen_call(call)
        if isinstance(seen, str):
            record.add_dense(seen)
            return call.dense()
        if record.layout is None and begun is not None:
            begun(seen.layout)
        out = measure(call, seen) if record.takes(seen.place, seen.layout) else call.dense()
        if progress is not None:
            progress(seen.place.layer)
        return out

    def measure(call: AttentionCall, seen: SeenCall) -> Tensor:
        place, layout, padding = seen
        clock = CallClock(record, place.layer, layout, call.asked)
        out = clock.time_dense(call.query, call.dense)
        exact, qkv = call.given(out, padding), call.take(padding)
        clock.time_dense_part(qkv)
        for pattern in record.candidates:
            if pattern.is_full(layout.grid.t):
                error, of_heads = 0.0, np.zeros(exact.shape[1])
            else:
                approximate = tile_attention(*qkv, layout, pattern, dense=call.asked, backend=simplest_backend(pattern))
                clock.time_candidate(pattern, qkv)
                error, of_heads = compare(approximate, exact)
            record.compared(ATTENTION, place.layer, pattern, error, exact)
            record.add_heads(place.layer, pattern, place.first_head, of_heads)
        return out

    return override_by(answer, previous)


def _replayed(call: AttentionCall, replay: Replay) -> Tensor:
    """A call that is computed again. Its place was counted already where it is of a block that is."""
    video = video_of_call(call)
    if isinstance(video, str):
        return call.dense()
    layout, padding = video
    if replay.layer is not None:
        place = place_of_call(call)
        if place is None or place.layer != replay.layer:
            return call.dense()
    if replay.pattern.is_full(layout.grid.t):
        return call.dense()
    backend = simplest_backend(replay.pattern)
    out = tile_attention(*call.take(padding), layout, replay.pattern, dense=call.asked, backend=backend)
    return call.give(out, padding)
