"""Blocks of a forward that other nodes replace, as guidance does that skips a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...efficient_vdit_core.attention.hook.state import ForwardState

Block = tuple[Any, ...]  # such as ("double_block", 3)
Replacement = Callable[..., Any]


def replaced_blocks(options: dict[str, Any]) -> tuple[Block, ...]:
    """Which, as ComfyUI keys them."""
    return tuple(sorted(_replacements(options), key=str))


def counting_blocks(options: dict[str, Any], state: ForwardState) -> dict[str, Any]:
    """``options`` under which ``state`` counts on behind a block however often its replacement asks its attention, or not."""
    replaced = _replacements(options)
    layers = {block: _layer(block, state) for block in replaced}
    counting = {block: _counted(replaced[block], state, at) for block, at in layers.items() if at is not None}
    if not counting:
        return options
    return {**options, "patches_replace": {**options["patches_replace"], "dit": {**replaced, **counting}}}


def _replacements(options: dict[str, Any]) -> dict[Block, Replacement]:
    return options.get("patches_replace", {}).get("dit", {})


def _layer(block: Block, state: ForwardState) -> int | None:
    """The layer that a block is; None for what is no numbered block, and where the model has blocks of several types and this
    is of none of them."""
    match block:
        case (str(kind), int(number), *_):
            start = state.offsets.get(kind.removesuffix("_block"), 0 if len(state.offsets) < 2 else None)
            return None if start is None else start + number
    return None


def _counted(replacement: Replacement, state: ForwardState, layer: int) -> Replacement:
    """The replacement, whose original block attends as ``layer`` however often it is asked: guidance may compute it twice and
    take a mean."""

    def run(block: dict[str, Any], extra: dict[str, Any]) -> Any:
        original = extra["original_block"]

        def as_its_layer(block: dict[str, Any]) -> Any:
            state.count_from(layer)
            return original(block)

        state.count_from(layer)
        out = replacement(block, {**extra, "original_block": as_its_layer})
        state.count_from(layer + 1)
        return out

    return run
