"""Today's models of which blocks can be timed, by the names of `bounds.MODELS`."""

from __future__ import annotations

from . import minimax_h3, wan

# (clip, depth, device, *, references, dtype, repeats, seed) -> rows
MEASURES = {"minimax_h3": minimax_h3.measure, "wan_14b": wan.measure}
