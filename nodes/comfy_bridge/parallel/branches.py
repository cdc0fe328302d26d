"""Gives each group of ranks its branches of a batch, and joins what the groups make: in the workers.

CFG evaluates several conditionings; ComfyUI joins those of one shape to a batch, whose entries stand branch by branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....efficient_vdit_core.attention.backends.spans import Span
from ....efficient_vdit_core.parallel.sharding.communicator import Communicator
from ....efficient_vdit_core.parallel.sharding.division import Division
from ..model_call import ModelCall, around_model

WRAPPER_KEY = "efficient_vdit_branches"
DIVISION_KEY, COMM_KEY, WEIGHTS_KEY = "evdit_division", "evdit_wire", "evdit_weights"
BRANCHES_OF = "cond_or_uncond"  # ComfyUI's: which conditioning each branch of the batch is of
JOIN = "gather of branches"


def told(division: Division) -> dict[str, Any]:
    """A division as a part of the message of a step."""
    return {"division": {"groups": division.groups, "parts": division.parts}}


def division_of(message: Mapping[str, Any]) -> Division | None:
    """The inverse of ``told``; None where nothing was told."""
    about = message.get("division")
    return about and Division(*(tuple((*part,) for part in about[name]) for name in ("groups", "parts")))


def share_out_branches(comm: Communicator) -> Any:
    """An APPLY_MODEL wrapper. ``transformer_options[DIVISION_KEY]`` says what is whose, default all branches are
    everybody's; inside it COMM_KEY is the comm of this rank's group, and WEIGHTS_KEY the shares in it."""

    def share_out(call: ModelCall) -> Any:
        division: Division | None = call.options.get(DIVISION_KEY)
        if division is None or not division.by_branches:
            return call.run()
        number = division.group_of(comm.rank)
        start, stop = division.parts[number]
        batch, each = len(call.x), len(call.x) // division.branches
        mine = partial(cut, rows=(start * each, stop * each), batch=batch)
        options = {
            **call.options,
            BRANCHES_OF: call.options[BRANCHES_OF][start:stop],
            COMM_KEY: comm.part(division.groups),
            WEIGHTS_KEY: _shares_in(division.groups[number], call.options.get(WEIGHTS_KEY, ())),
        }
        own = {name: mine(getattr(call, name)) for name in ("x", "t", "c_concat", "c_crossattn")}
        conds = {name: mine(value) for name, value in call.conds.items()}
        return _joined(replace(call, **own, options=options, conds=conds).run(), division, each, comm)

    return around_model(share_out)


def cut(value: Any, rows: Span, batch: int) -> Any:
    """The ``rows`` of an input of a forward over so large a ``batch``; what has none, such as a number or a record, is
    all branches'."""
    if isinstance(value, Tensor):
        return value[slice(*rows)] if value.ndim else value
    if _is_tensors(value):
        return type(value)(cut(part, rows, batch) for part in value)
    return value


def why_whole(inputs: Mapping[str, Any], branches: int) -> str:
    """Why the batch of these inputs, of which ``x`` is one, cannot be cut into branches; "" where it can."""
    batch = len(inputs["x"])
    if batch % branches:
        return f"{batch} entries are not {branches} branches of one size"
    for name, value in inputs.items():
        tensors = value if _is_tensors(value) else [value]
        if any(isinstance(x, Tensor) and x.ndim and len(x) != batch for x in tensors):
            return f"its input {name} has no entry for each branch"
    return ""


def _is_tensors(value: Any) -> bool:
    """ComfyUI joins lists of tensors, such as reference latents, tensor by tensor."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(part, Tensor) for part in value)


def _shares_in(group: tuple[int, ...], weights: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(weights[rank] for rank in group) if weights else ()
    return found if len(set(found)) > 1 else ()


def _joined(out: Tensor, division: Division, each: int, comm: Communicator) -> Tensor:
    """The results of all branches, in their order, on every rank; within a group all have the same."""
    rows = [(stop - start) * each for start, stop in division.parts]
    of_rank = [rows[division.group_of(rank)] for rank in range(comm.size)]
    found = comm.gather(JOIN, [out], [[((count, *out.shape[1:]), out.dtype)] for count in of_rank])
    return torch.cat([found[group[0]][0] for group in division.groups])
