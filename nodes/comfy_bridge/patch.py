"""Puts sparse attention into a MODEL through ComfyUI's own hooks: a keyed wrapper and the attention override."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...efficient_vdit_core.attention import check_backend
from ...efficient_vdit_core.attention.hook.prepare import Preparation
from ...efficient_vdit_core.attention.report.measure import StepMeasure
from ...efficient_vdit_core.attention.report.report import AttentionReport
from ...efficient_vdit_core.plan import TilePlan
from .families import class_of, find_family, uncompiled, why_no_family
from .hook import DENSE_KEY, WRAPPER_KEY, Hook
from .publish import install
from .run_log import STAYS_DENSE, log_dense, log_report
from .second_model import tell_where_nobody_asks
from .window import Window

log = logging.getLogger("efficient_vdit")


def patch_attention(
    model: Any,
    plan: TilePlan,
    *,
    window: Window | None = None,
    min_tokens: int = 0,
    placement: str = "strided",
    decline_slow: bool = True,
    backend: str = "auto",
    measure: bool = False,
    residual_every: int = 0,
    after_run: Callable[[AttentionReport, int], None] | None = None,
) -> Any:
    """A clone of MODEL whose self-attention follows the plan.

    Args:
        window: the steps that are sparse, default all; outside it the attention is dense.
        min_tokens: calls with fewer video tokens stay dense.
        placement: where the reference frames stand, one of ``tiles.PLACEMENTS``; rotating moves by a frame a step.
        decline_slow: patterns that would not be faster than dense, by rule or as measured, stay dense.
        backend: what computes the sparse attention, ``auto`` or one of ``attention.BACKENDS``.
        measure: one step of each run is computed dense as well, and the report tells both times.
        residual_every: sparse layers keep their difference to dense attention for so many steps, 0 = never.
        after_run: called after each sampling with its counts and the number of layers; of a MODEL that stays dense as a
            whole with 0 of both, and the reason in the report.

    Raises:
        ValueError: the window is empty, the plan is for another model, the backend cannot run here, or the model's
            VAE has no chunk heads, which ``placement`` asks for.
    """
    window = window or Window()
    window.check()
    if backend != "auto":
        check_backend(backend, model.load_device)
    kind, diffusion_model = class_of(model), uncompiled(model.get_model_object("diffusion_model"))
    family = find_family(kind)
    why = why_no_family(kind) if family is None else family.why_no_hook()
    if family is None or why:
        return _left_dense(model, kind.__name__, why, after_run)
    stack = family.stack(diffusion_model)
    plan.check_fits(family=family.name, layers=stack.depth, heads=stack.heads)
    if placement == "chunk heads" and not family.chunk_heads:
        raise ValueError(
            f"placement is 'chunk heads', latent frames of one pixel frame, which MiniMax-H3 has and {family.name} has not. "
            "Choose strided."
        )
    report = AttentionReport(measure=StepMeasure() if measure else None)
    preparation = Preparation(
        plan, report, min_tokens=min_tokens, placement=placement, decline_slow=decline_slow, backend=backend,
        residual_every=residual_every,
    )  # fmt: skip
    hook = Hook(
        family, window, preparation, None, family.caution(diffusion_model), family.token_weights(diffusion_model), stack=stack
    )  # fmt: skip
    if after_run is not None:
        hook.after_run = lambda: after_run(report, stack.depth)
    patched = install(model, hook)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, log_report(hook))
    tell_where_nobody_asks(patched, hook)
    return patched


def _left_dense(model: Any, name: str, why: str, after_run: Callable[[AttentionReport, int], None] | None) -> Any:
    """A clone of MODEL, of the class ``name``, that says ``why`` it stays dense, now and after further runs: ComfyUI keeps the
    clone and runs the node no more."""
    log.warning(STAYS_DENSE, name, why)
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, DENSE_KEY)  # a second node takes the place of the first
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, DENSE_KEY, log_dense(name, why, after_run))
    return patched
