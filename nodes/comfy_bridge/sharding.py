"""Makes a MODEL compute on the sharded tokens of one rank, through ComfyUI's own hooks. Runs in the workers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention import TokenLayout
from ...efficient_vdit_core.attention.state import FORWARD_KEY, ForwardState
from ...efficient_vdit_core.parallel.sharding.blocks import (
    SHARDED_KEY,
    ShardedForward,
    block_hook,
    make_sharded_override,
)
from ...efficient_vdit_core.parallel.sharding.forecast import LayerShape, Rates, forward_speedup
from ...efficient_vdit_core.parallel.sharding.wire import Wire
from ...efficient_vdit_core.tiles import TilePattern, TokenGrid
from .families import Family, find_family, uncompiled
from .patch import Hook, dense, hook_of, install
from .window import Window

WRAPPER_KEY = "efficient_vdit_sharding"
SCHEME_KEY = "evdit_scheme"
COUNTS_KEY = "evdit_scheme_counts"
# Models whose blocks take the video tokens alone, one after another, with nothing done to them in between.
SHARDABLE = ("OpenSoraT2V", "WanModel", "CameraWanModel")


def find_shardable(model: Any) -> Family:
    """The family of a MODEL that can be sharded. Raises ValueError with the reason where it cannot."""
    diffusion_model = uncompiled(model.get_model_object("diffusion_model"))
    family = find_family(diffusion_model)
    name = type(diffusion_model).__name__
    if family is None or name not in SHARDABLE:
        raise ValueError(
            f"{name} cannot be sharded: its blocks are not known to take the video tokens alone. "
            f"These do: {', '.join(SHARDABLE)}. Bypass EVDiTSequenceParallel for this model."
        )
    whole = {"attn1_patch", "attn2_patch", "double_block"}
    hook = hook_of(model)
    if hook is not None and hook.preparation.residual is not None:
        raise ValueError(
            "Sparse Attention keeps a residual (residual_every), which no rank holds. Set residual_every to 0, or bypass "
            "EVDiTSequenceParallel."
        )
    patches = sorted(whole & set(model.model_options["transformer_options"].get("patches", {})))
    if patches and family.name == "wan":  # the other family never asks them
        raise ValueError(
            f"Another node patches what the layers give ({', '.join(patches)}), as InfiniteTalk does, and expects the whole video "
            "there, which no rank holds. Bypass that node, or EVDiTSequenceParallel."
        )
    return family


def clip_speedup(model: Any, grid: TokenGrid, ranks: int, scheme: str, rates: Rates) -> float:
    """The speed-up that ``rates`` promise for a shardable MODEL and its plan on a video of ``grid`` tokens."""
    diffusion_model: Any = uncompiled(model.get_model_object("diffusion_model"))
    family = find_shardable(model)
    heads, depth = family.head_count(diffusion_model), family.depth(diffusion_model)
    head_dim = family.head_dim(diffusion_model)
    hook, state = hook_of(model), ForwardState(TokenLayout(grid), depth=depth)
    patterns = [
        TilePattern(None) if hook is None else hook.preparation.pattern_of(state, layer) for layer in range(depth)
    ]
    shape = LayerShape(grid, heads, head_dim, itemsize=model.model.get_dtype().itemsize)
    return forward_speedup(shape, patterns, ranks, scheme, rates)


def shard_model(model: Any, wire: Wire) -> Any:
    """A clone of MODEL whose blocks run on this rank's tokens.

    ``transformer_options[SCHEME_KEY]`` chooses the scheme of a forward, default auto; a Counter under COUNTS_KEY
    receives how many layers took which.
    """
    family, hook = find_shardable(model), hook_of(model)
    window, preparation = (hook.window, hook.preparation) if hook else (Window(), dense())
    # The sparse override decides by the whole sequence's length, which no rank sees; its plan is asked for beforehand.
    patched = install(model, Hook(family, window, preparation, make_sharded_override))
    depth = family.depth(uncompiled(patched.get_model_object("diffusion_model")))
    options = patched.model_options["transformer_options"]
    hooks = options.get("patches_replace", {}).get("dit", {})
    for layer in range(depth):
        patched.set_model_patch_replace(
            block_hook(layer, depth, hooks.get(("double_block", layer))), "dit", "double_block", layer
        )
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, _publish(depth, wire))
    return patched


def plan_text(model: Any) -> str:
    """The plan of a sharded MODEL, which must be the same on every rank; empty where it has none."""
    hook = hook_of(model)
    return "" if hook is None else hook.plan.to_text()


def _publish(depth: int, wire: Wire) -> Any:
    """An APPLY_MODEL wrapper: says for this forward which rank holds which tokens, and every layer's pattern."""

    def wrapper(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        state: ForwardState = options[FORWARD_KEY]
        if state.layout is None:
            raise ValueError(f"This run cannot be sharded: {state.reason}. Bypass EVDiTSequenceParallel.")
        patterns = [state.owner.pattern_of(state, layer) for layer in range(depth)]
        sharded = options[SHARDED_KEY] = ShardedForward(state.layout, patterns, wire, options.get(SCHEME_KEY, "auto"))
        out = executor(x, t, c_concat, c_crossattn, control, options, **conds)
        options.get(COUNTS_KEY, Counter()).update(sharded.schemes)
        return out

    return wrapper
