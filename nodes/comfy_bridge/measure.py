"""Computes a forward of the model twice, dense for its time and sparse for the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention.gpu import OUT_OF_MEMORY, one_out_of_memory
from ...efficient_vdit_core.attention.hook.state import ForwardState
from ...efficient_vdit_core.attention.report.measure import StepMeasure
from ...efficient_vdit_core.attention.report.report import AttentionReport
from ...efficient_vdit_core.timing import seconds, wait_for

DENSE = "measured dense beside the run"
SHORT = 1.0  # seconds; below it a forward's time is that of the best of three


def why_not_twice(patcher: Any, model_options: dict[str, Any], own: str) -> str:
    """Why one more forward would change a run of the MODEL under these options, "" where none is known to; ``own`` is the key
    of our own wrappers.

    A node that wraps the whole sampling and each forward under one key keeps a state of the run, as EasyCache does;
    what a function around ComfyUI's call of the model keeps, as TeaCache does, cannot be known.
    """
    wrappers = patcher.wrappers
    around, inside = (
        {key for kind in kinds for key, found in wrappers.get(kind, {}).items() if found}
        for kinds in ((WrappersMP.OUTER_SAMPLE,), (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL))
    )
    names = sorted(str(key) for key in (around & inside) - {own, None})
    if "model_function_wrapper" in model_options:
        names.append("a node around the model's forwards")
    if not names:
        return ""
    return f"{', '.join(names)} may keep something of each forward for the next, and one more would disturb it"


def computed_twice(
    measure: StepMeasure, run: Callable[[ForwardState], Tensor], state: ForwardState, device: torch.device
) -> Tensor:
    """``run(state)`` as it is without a measurement; beside it the same forward is computed dense, and ``measure``
    receives the seconds of both.

    What the forwards beside the run call is counted nowhere, and no random numbers of the run are drawn. Where a dense
    one finds no memory the run goes on without it.
    """

    def beside(**changes: Any) -> float:
        mm.throw_exception_if_processing_interrupted()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return seconds(lambda: run(state.again(report=AttentionReport(), **changes)), device)

    try:
        with one_out_of_memory():
            if measure.cold:
                beside()
            dense = _shortest(beside(reason=DENSE), lambda: beside(reason=DENSE))
    except OUT_OF_MEMORY:
        measure.refused = "a dense step found no memory"
        dense = 0.0
    mm.throw_exception_if_processing_interrupted()
    start = time.perf_counter()
    out = run(state)
    if dense:
        wait_for(device)
        every = state.residual.cache.every if state.residual is not None else 0
        measure.add(dense, _shortest(time.perf_counter() - start, beside), every)
    return out


def renewal_timed(
    measure: StepMeasure, run: Callable[[ForwardState], Tensor], state: ForwardState, device: torch.device
) -> Tensor:
    """``run(state)``, a forward that renews the cached residual; ``measure`` receives its seconds. It is computed once: a
    second time would renew what was just renewed."""
    out: list[Tensor] = []
    measure.add_renewal(seconds(lambda: out.append(run(state)), device))
    return out[0]


def _shortest(taken: float, again: Callable[[], float]) -> float:
    """The seconds of a forward that took ``taken``; a short one is computed twice more, for chance weighs in its
    time."""
    return taken if taken >= SHORT else min(taken, again(), again())
