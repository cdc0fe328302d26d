"""Makes a MODEL compute on the sharded tokens of one rank, through ComfyUI's own hooks. Runs in the workers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ....efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from ....efficient_vdit_core.parallel.sharding.blocks import SHARDED_KEY, ShardedForward, block_hook
from ....efficient_vdit_core.parallel.sharding.communicator import Communicator, form
from ....efficient_vdit_core.parallel.sharding.division import Division
from ....efficient_vdit_core.parallel.sharding.override import make_sharded_override
from ....efficient_vdit_core.plan.head_patterns import LayerPattern
from ....efficient_vdit_core.tiles import TilePattern
from ..families import Family, class_of, find_family, uncompiled
from ..forward import call_shape
from ..hook import Hook, dense, hook_of
from ..model_call import ModelCall, around_model
from ..publish import dense_attention, install
from ..replaced_blocks import replaced_blocks
from ..window import Window
from .attention_counts import count_calls
from .branches import COMM_KEY, DIVISION_KEY, WEIGHTS_KEY, share_out_branches
from .branches import WRAPPER_KEY as BRANCHES_KEY
from .module_forwards import Seat, all_keys_forward, block_forward, paths, replace_forward, whole_forward
from .shard_rules import NOT_SHARDED, RULES, Row, ShardRule
from .sharded_weights import SHARDED_WEIGHTS, WHOLE_WEIGHTS, share_out_weights

WRAPPER_KEY = "efficient_vdit_sharding"
SCHEME_KEY = "evdit_scheme"
COUNTS_KEY = "evdit_scheme_counts"
REPORT_KEY = "evdit_report_of_ranks"


def find_shardable(model: Any) -> tuple[Family, ShardRule]:
    """The family of a MODEL that can be sharded, and how. Raises ValueError with the reason where it cannot."""
    kind, diffusion_model = class_of(model), uncompiled(model.get_model_object("diffusion_model"))
    family, name = find_family(kind), kind.__name__
    if family is None or name not in RULES:
        why = NOT_SHARDED.get(name, f"known are {', '.join(RULES)}")
        raise ValueError(f"{name} cannot be sharded: {why}. Bypass EVDiTSequenceParallel for this model.")
    rule = RULES[name]
    if why := family.why_no_hook() or _why_not_these_layers(diffusion_model):
        raise ValueError(f"{name} cannot be sharded: {why}. Bypass EVDiTSequenceParallel for this model.")
    hook = hook_of(model)
    if hook is not None and hook.preparation.residual is not None:
        raise ValueError(
            "Sparse Attention keeps a residual (residual_every), which no rank holds. Set residual_every to 0, or bypass "
            "EVDiTSequenceParallel."
        )
    options = model.model_options["transformer_options"]
    patches = sorted(rule.patches & set(options.get("patches", {})))
    if patches:
        raise ValueError(
            f"Another node patches what the layers give ({', '.join(patches)}), as InfiniteTalk does, and expects the whole video "
            "there, which no rank holds. Bypass that node, or EVDiTSequenceParallel."
        )
    if rule.hooks_place_tokens and replaced_blocks(options):
        raise ValueError(
            f"Another node replaces blocks of {name}, as its Fun ControlNet does, and may place what it adds by the whole sequence's "
            "tokens, which no rank holds. Bypass that node, or EVDiTSequenceParallel."
        )
    return family, rule


def _why_not_these_layers(diffusion_model: Any) -> str:
    """VACE adds what its own blocks give behind a layer, and behind the last one all tokens are there."""
    last = len(getattr(diffusion_model, "blocks", ())) - 1
    return (
        "one of its VACE blocks stands behind the last layer"
        if last in getattr(diffusion_model, "vace_layers_mapping", {})
        else ""
    )


def shard_model(model: Any, comm: Communicator, *, weights: str = WHOLE_WEIGHTS) -> Any:
    """A clone of MODEL whose blocks run on this rank's tokens, with ``weights`` as of the node's input.

    ``transformer_options[SCHEME_KEY]`` chooses the scheme of a forward, default auto, WEIGHTS_KEY the ranks' shares,
    default even ones, DIVISION_KEY which branches are whose; a Counter under COUNTS_KEY receives how many layers took
    which scheme, and an AttentionReport under REPORT_KEY which calls were sparse.
    """
    (family, rule), hook = find_shardable(model), hook_of(model)
    model = share_out_weights(model, rule, comm) if weights == SHARDED_WEIGHTS else model.clone()
    # Outside of what looks at the tokens, which are then a group's own; inside of other nodes' wrappers, which see the batch.
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, BRANCHES_KEY, share_out_branches(comm))
    window, preparation = (hook.window, hook.preparation) if hook else (Window(), dense())
    # The sparse override decides by the whole sequence's length, which no rank sees; its plan is asked for beforehand.
    patched = install(model, Hook(family, window, preparation, make_sharded_override))
    diffusion_model, seat, first = uncompiled(patched.get_model_object("diffusion_model")), Seat(), 0
    for row in rule.rows:
        count = len(getattr(diffusion_model, row.path, ()))
        for number in range(count):
            last, layer = number == count - 1 and not row.aside, None if row.aside else first + number
            if row.hook:
                _hook_block(patched, row, number, layer, last)
            else:
                block = getattr(diffusion_model, row.path)[number]
                replace_forward(patched, f"{row.path}.{number}", block_forward(type(block), row, layer, last, seat))
        first += 0 if row.aside else count
    for module in rule.whole:
        for path in paths(diffusion_model, module.path):
            replace_forward(
                patched, path, whole_forward(module, seat, patched.get_model_object(f"diffusion_model.{path}"))
            )
    for pattern in rule.all_keys:
        for path in paths(diffusion_model, pattern):
            replace_forward(patched, path, all_keys_forward(seat))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, _publish(family, diffusion_model, comm, seat))
    return patched


def plan_text(model: Any) -> str:
    """The plan of a sharded MODEL, which must be the same on every rank; empty where it has none."""
    hook = hook_of(model)
    return "" if hook is None else hook.plan.to_text()


def _hook_block(patched: Any, row: Row, number: int, layer: int | None, last: bool) -> None:
    hooks = patched.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    previous = hooks.get((row.hook, number))
    hook = block_hook(layer, last=last, about=row.about, previous=previous)
    patched.set_model_patch_replace(hook, "dit", row.hook, number)


def _publish(family: Family, diffusion_model: Any, comm: Communicator, seat: Seat) -> Any:
    """An APPLY_MODEL wrapper: says for this forward which rank holds which tokens, and every layer's pattern."""
    depth, heads = family.depth(diffusion_model), family.head_count(diffusion_model)

    def publish(call: ModelCall) -> Any:
        state: ForwardState = call.options[FORWARD_KEY]
        if state.layout is None:
            raise ValueError(f"This run cannot be sharded: {state.reason}. Bypass EVDiTSequenceParallel.")
        scheme, weights = call.options.get(SCHEME_KEY, "auto"), call.options.get(WEIGHTS_KEY, ())
        backend, at = state.owner.choices.backend, call.options.get(COMM_KEY, comm)
        patterns = [state.owner.pattern_of(state, layer) for layer in range(depth)]
        patterns = _without_slow(patterns, family, state, call, comm)
        sharded = ShardedForward(state.layout, patterns, at, scheme, heads, weights, backend)
        call.options[SHARDED_KEY] = seat.forward = sharded
        try:
            out = call.run()
            sharded.check_done()
        finally:
            seat.forward = None
        call.options.get(COUNTS_KEY, Counter()).update(sharded.schemes)
        if REPORT_KEY in call.options:
            count_calls(call.options[REPORT_KEY], state, sharded, _who(call.options.get(DIVISION_KEY), comm.rank))
        return out

    return around_model(publish)


def _without_slow(
    patterns: list[LayerPattern], family: Family, state: ForwardState, call: ModelCall, comm: Communicator
) -> list[LayerPattern]:
    """The patterns, full where one device alone would find dense attention faster for the whole sequence: the clip is to
    be that device's. Rank 0 measures, and all follow it, whichever branches they have, for two trials may differ."""
    full = TilePattern(None)
    if not state.owner.choices.may_decline or all(pattern == full for pattern in patterns):
        return patterns
    slow = torch.zeros(len(patterns), dtype=torch.uint8)
    if comm.rank == 0:
        shape = call_shape(family, call.model, call.x)
        slow[list(state.owner.slow_layers(state, shape, dense_attention(state, call)))] = 1
    (found,), *_ = comm.gather(
        "layers that stay dense", [slow.to(call.x.device)], [[form(slow, 0, len(slow))]] * comm.size
    )
    return [full if stays else pattern for pattern, stays in zip(patterns, found.tolist(), strict=True)]


def _who(division: Division | None, rank: int) -> str:
    """The ranks that compute a forward together with this one."""
    if division is None or not division.by_branches:
        return "all ranks"
    group = division.groups[division.group_of(rank)]
    return f"rank{'s' if len(group) > 1 else ''} {'+'.join(map(str, group))}"
