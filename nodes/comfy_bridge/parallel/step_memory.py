"""What a rank takes of its device for its part of a step, by ComfyUI's own estimate for a whole one. Runs in the
workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....efficient_vdit_core.attention.backends.spans import Span
from ....efficient_vdit_core.parallel.sharding.division import Division, by_sequence
from ..families import find_family, uncompiled
from ..forward import call_shape, forward_state
from .branches import cut

# Behind the last block a rank has the hidden state of all tokens, the others' parts of it, and what the last layer makes
# of it.
_WHOLE_STATES = 3


def step_memory(model: Any, inputs: Mapping[str, Any], rows: Span, share: float) -> float:
    """Bytes of activations where a rank computes ``share`` of the tokens of these ``rows`` of the batch.

    ``inputs``: as of ``apply_model``, by name.
    """
    base, x = model.model, inputs["x"]
    mine = {name: cut(value, rows, len(x)) for name, value in inputs.items() if name in base.memory_usage_factor_conds}
    shapes = {name: _shapes(value) for name, value in mine.items() if value is not None}
    whole = base.memory_required([rows[1] - rows[0], *x.shape[1:]], cond_shapes=shapes)
    return share * whole + (1 - share) * _WHOLE_STATES * _hidden_state(base, inputs, rows)


def part_of(rank: int, ranks: int, batch: int, weights: Sequence[int], division: Division | None) -> tuple[Span, float]:
    """The rows of the batch that a rank's group computes, and its share of their tokens; arguments as of a step."""
    division = division or by_sequence(ranks, 1)
    number = division.group_of(rank)
    counts = {other: weights[other] if weights else 1 for other in division.groups[number]}
    start, stop = (end * batch // division.branches for end in division.parts[number])
    return (start, stop), counts[rank] / sum(counts.values())


def _hidden_state(base: Any, inputs: Mapping[str, Any], rows: Span) -> int:
    """Bytes of the hidden state of all tokens; 0 where it is not known which they are, and the forward is refused."""
    network, x = uncompiled(base.diffusion_model), inputs["x"]
    family = find_family(network)
    assert family is not None, "a model that is shared out has a family"
    layout = forward_state(family, network, x, inputs.get("c_crossattn"), dict(inputs)).layout
    shape = call_shape(family, base, x)
    tokens = 0 if layout is None else layout.tokens
    return (rows[1] - rows[0]) * tokens * shape.heads * shape.head_dim * shape.dtype.itemsize


def _shapes(value: Any) -> list[list[int]]:
    """Of a conditioning, as ComfyUI's estimate takes them."""
    return [list(x.shape) for x in ([value] if isinstance(value, Tensor) else value)]
