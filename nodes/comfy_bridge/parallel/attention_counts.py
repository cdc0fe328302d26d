"""The attention calls that the ranks make, in the report of Sparse Attention: counted in the workers, told in ComfyUI's
process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....efficient_vdit_core.attention.hook.reasons import why_no_pattern
from ....efficient_vdit_core.attention.hook.state import ForwardState
from ....efficient_vdit_core.attention.report.reason_names import MEASURED_FASTER
from ....efficient_vdit_core.attention.report.report import AttentionReport
from ....efficient_vdit_core.parallel.sharding.blocks import ShardedForward
from ..families import uncompiled
from ..forward import call_shape, forward_state
from ..hook import Hook
from ..model_call import ModelCall

MEASURED_ONCE = "the workers compute each step once"


def count_calls(report: AttentionReport, state: ForwardState, sharded: ShardedForward, who: str) -> None:
    """In a worker: the self-attentions of a forward, once each, though all its ranks make them together. ``who`` names the
    ranks, for what computed them.

    Where each group of ranks has branches of its own, all make the same calls, as one process would with the whole batch.
    """
    grid, extra = sharded.layout.grid, sharded.layout.prefix + sharded.layout.suffix
    for layer, scheme in sharded.attended:
        pattern, computed = sharded.patterns[layer], f"{scheme} on {who}"
        if pattern.is_full(grid.t):
            report.add_dense(_why_dense(state, sharded, layer), computed)
        else:
            report.add_sparse(pattern.flop_density(grid, extra), computed)


def tell_report(hook: Hook, call: ModelCall, counts: Mapping[str, Any]) -> None:
    """In ComfyUI's process: to the report of Sparse Attention, whose ``hook`` did not see the calls of this forward."""
    network = uncompiled(call.model.diffusion_model)
    state = forward_state(hook.family, network, call.x, call.c_crossattn, call.conds)
    hook.run.asked = True
    hook.tell_clip(state, call_shape(hook.family, call.model, call.x))
    hook.report.add_counts(counts)
    if hook.report.measure is not None:
        hook.report.measure.refused = MEASURED_ONCE


def _why_dense(state: ForwardState, sharded: ShardedForward, layer: int) -> str:
    """What neither the forward nor the layer's plan gives a reason for, the trial of the backends has found faster dense."""
    return why_no_pattern(state, sharded.layout, None) or state.owner.layer(state, layer).reason or MEASURED_FASTER
