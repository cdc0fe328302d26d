"""Why an attention call stays dense: one ladder, asked by runs, searches and forecasts."""

from __future__ import annotations

from torch import Tensor

from ...plan.head_patterns import LayerPattern
from ..layout import TokenLayout
from ..report.reason_names import (
    ALONE,
    ANOTHER_LENGTH,
    BELOW_MIN_TOKENS,
    CROSS_ATTENTION,
    FULL,
    MASKED,
    NO_GRID,
    RENEWED_TOO_OFTEN,
    SINGLE_FRAME,
    TOO_DENSE,
    TOO_FEW_FRAMES,
)
from .attention_call import AttentionCall
from .state import ForwardState

# Below this many latent frames, or above this share of dense FLOPs, two attention calls take as long as one.
FEWEST_FRAMES = 4
HIGHEST_DENSITY = 0.9


def why_not_the_video(call: AttentionCall) -> str:
    """The reason why this is no self-attention over the video; an empty text where it is."""
    state = call.state
    if state is None:
        return NO_GRID
    if call.crosses:
        # How LTX gives guides another strength: a mask weighs all tokens for a part of the queries.
        a_part = call.mask is not None and state.layout is not None and call.keys == state.layout.tokens
        return MASKED if a_part else CROSS_ATTENTION
    if state.layout is None:
        return state.reason
    if call.tokens == state.layout.tokens:
        return ""
    return ALONE if call.tokens in state.others else ANOTHER_LENGTH


def why_no_pattern(state: ForwardState, layout: TokenLayout, mask: Tensor | None) -> str:
    """The reason why no pattern goes over this self-attention over the video; an empty text where one can."""
    if layout.grid.t == 1:
        return SINGLE_FRAME
    if mask is not None and not state.masks_padding_alone(layout, mask):
        return MASKED
    return state.reason


def why_not_worth_it(
    layout: TokenLayout, pattern: LayerPattern, min_tokens: int, decline_slow: bool, renewed: float = 0.0
) -> str:
    """The reason why this pattern is not put over a layer of this layout; an empty text where it is. ``renewed``: the share
    of its calls that compute dense attention as well."""
    if layout.grid.tokens < min_tokens:
        return BELOW_MIN_TOKENS
    if pattern.is_full(layout.grid.t):
        return FULL
    if decline_slow and layout.grid.t < FEWEST_FRAMES:
        return TOO_FEW_FRAMES
    if not decline_slow:
        return ""
    density = pattern.flop_density(layout.grid, layout.prefix + layout.suffix)
    if density > HIGHEST_DENSITY:
        return TOO_DENSE
    return RENEWED_TOO_OFTEN if density + renewed > HIGHEST_DENSITY else ""
