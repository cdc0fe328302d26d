"""Blocks of a forward that other nodes replace, as guidance does that skips a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...efficient_vdit_core.attention.state import ForwardState

Block = tuple[Any, ...]  # such as ("double_block", 3)


def replaced_blocks(options: dict[str, Any]) -> tuple[Block, ...]:
    """Which, as ComfyUI keys them."""
    return tuple(sorted(options.get("patches_replace", {}).get("dit", {}), key=str))


def counting_blocks(options: dict[str, Any], state: ForwardState) -> dict[str, Any]:
    """``options`` under which ``state`` counts on behind a block whose replacement does not ask its attention."""
    replaced = options.get("patches_replace", {}).get("dit", {})
    layers = {block: _layer(block, state) for block in replaced}
    counting = {block: _counted(replaced[block], state, at) for block, at in layers.items() if at is not None}
    if not counting:
        return options
    return {**options, "patches_replace": {**options["patches_replace"], "dit": {**replaced, **counting}}}


def _layer(block: Block, state: ForwardState) -> int | None:
    """The layer that a block is; None where the model has blocks of several types, and this is of none of them."""
    kind, number = str(block[0]).removesuffix("_block"), int(block[1])
    if kind in state.offsets:
        return state.offsets[kind] + number
    return number if len(state.offsets) < 2 else None


def _counted(replacement: Callable[..., Any], state: ForwardState, layer: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        state.count_from(layer)
        out = replacement(*args, **kwargs)
        state.count_from(layer + 1)
        return out

    return run
