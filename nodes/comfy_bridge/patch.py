"""Puts sparse attention into a MODEL through ComfyUI's own hooks: a keyed wrapper and the attention override."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention import check_backend
from ...efficient_vdit_core.attention.override import FORWARD_KEY, ForwardState, Override, make_attention_override
from ...efficient_vdit_core.attention.report import AttentionReport
from ...efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from ...efficient_vdit_core.plan import TilePlan
from .families import Family, find_family, uncompiled, why_no_family
from .layouts import UnknownLayout

log = logging.getLogger("efficient_vdit")

WRAPPER_KEY = "efficient_vdit"
Window = tuple[float, float]
NO_REASONS = {"scaled"}  # warnings that do not say why nothing became sparse
# A step may lie on the window's edge; schedule and window round it in their own ways.
_ROUNDING = 1 + 1e-4


def patch_attention(
    model: Any,
    plan: TilePlan,
    *,
    window: Window = (0.0, 1.0),
    min_tokens: int = 0,
    placement: str = "strided",
    decline_slow: bool = True,
    backend: str = "auto",
    after_run: Callable[[AttentionReport, int, float], None] | None = None,
) -> Any:
    """A clone of MODEL whose self-attention follows the plan.

    Args:
        window: start and end as fractions 0..1 of the noise schedule; outside it the attention is dense.
        min_tokens: calls with fewer video tokens stay dense.
        placement: where the reference frames stand, one of ``tiles.PLACEMENTS``; rotating moves by a frame a step.
        decline_slow: patterns that would not be faster than dense, by rule or as measured, stay dense.
        backend: what computes the sparse attention, ``auto`` or one of ``attention.BACKENDS``.
        after_run: called after each sampling with its counts, the number of layers, and the seconds it took.

    Raises:
        ValueError: the window is empty, the plan is for another model, or the backend cannot run here.
    """
    if window[0] >= window[1]:
        raise ValueError(
            f"start_percent is {window[0]} and end_percent {window[1]}, expected start below end: no step would be sparse. "
            "Lower start_percent, raise end_percent, or bypass the node."
        )
    if backend != "auto":
        check_backend(backend, model.load_device)
    patched = model.clone()
    diffusion_model = uncompiled(patched.get_model_object("diffusion_model"))
    family = find_family(diffusion_model)
    why = why_no_family(diffusion_model) if family is None else family.why_no_hook()
    if family is None or why:
        log.warning("Efficient-vDiT: %s stays dense: %s.", type(diffusion_model).__name__, why)
        return patched
    depth = family.depth(diffusion_model)
    plan.check_fits(family=family.name, layers=depth, heads=family.head_count(diffusion_model))
    _check_dense_layers(plan, depth)
    report = AttentionReport()
    options = patched.model_options["transformer_options"]
    # A second plan takes the place of the first: two of them cannot both decide about one call. Where another node
    # stands between them, the first stays in the chain and leaves alone what it does not own.
    previous = options.get(OVERRIDE)
    previous = getattr(previous, "replaces", previous)
    # Kept out of torch.compile: it counts calls, and each count would compile the model anew.
    sparse: Any = make_attention_override(
        plan,
        report,
        min_tokens=min_tokens,
        previous=previous,
        placement=placement,
        decline_slow=decline_slow,
        backend=backend,
    )
    override: Any = torch.compiler.disable(sparse)
    override.replaces, override.report, override.plan = previous, report, plan
    options[OVERRIDE] = override
    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, _publish_layout(family, window, report, sparse, count_steps=placement == "rotating")),
        (WrappersMP.OUTER_SAMPLE, _log_report(report, depth, after_run)),
    ):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
        patched.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    return patched


def _check_dense_layers(plan: TilePlan, depth: int) -> None:
    for edge in {edge for pair in plan.dense_layers for edge in pair}:
        if not -depth <= edge < depth:
            raise ValueError(
                f"dense_blocks or the plan names layer {edge}, but the model has {depth} layers: 0 to {depth - 1}, or -{depth} "
                "to -1 counted from the end. Correct whichever it is."
            )


def _publish_layout(
    family: Family, window: Window, report: AttentionReport, override: Override, *, count_steps: bool
) -> Callable[..., Any]:
    """An APPLY_MODEL wrapper: tells the ``override`` where the video tokens of this forward stand, and whether it
    acts."""

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
        base_model = executor.class_obj
        state = forward_state(family, uncompiled(base_model.diffusion_model), x, c_crossattn, conds)
        if state.layout is not None:
            report.frames = state.layout.grid.t
        if state.layout is None:
            report.warn("unknown layout", f"the attention stays dense: {state.reason}.")
        elif not _in_window(base_model.model_sampling, window, t):
            state.active, state.reason = False, "outside the step window"
        if count_steps:
            state.step = _step(options, t)
        state.owner = override
        options[FORWARD_KEY] = state
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    return wrapper


def forward_state(family: Family, model: Any, x: Tensor, text: Tensor | None, conds: dict[str, Any]) -> ForwardState:
    """Where the video tokens of a forward on latents ``x`` stand; a state without a layout, with the reason, where
    unknown."""
    # Video with audio comes packed into one tensor, and the shapes beside it.
    size = conds["latent_shapes"][0] if "latent_shapes" in conds else x.shape
    try:
        if len(size) != 5:
            raise UnknownLayout(
                f"its latents have the shape {tuple(size)}, expected (batch, channels, frames, height, width)"
            )
        found = family.layout(size, model, text, conds)
    except UnknownLayout as error:
        return ForwardState(None, active=False, reason=str(error))
    state = ForwardState(
        found.layout,
        others=frozenset(found.others),
        depth=family.depth(model),
        offsets=family.offsets(model),
        order=family.order(model, conds),
        padding=found.padding,
    )
    if found.layout.tokens in state.others:
        # Cross-attention is told from self-attention by its length; here the lengths are the same.
        state.active, state.reason = False, "text or audio as long as the video"
    return state


def _step(options: dict[str, Any], t: Tensor) -> int:
    """The step of the schedule that noise level ``t`` belongs to, 0 = first; 0 where there is no schedule."""
    schedule = options.get("sample_sigmas")
    if schedule is None:
        return 0
    reached = schedule.float() * _ROUNDING >= float(t.flatten()[0])
    return max(0, int(reached.sum()) - 1)


def _in_window(model_sampling: Any, window: Window, t: Tensor) -> bool:
    """Whether this step's noise level lies in the window. Reads the level from the device, so once a forward only."""
    if window == (0.0, 1.0):
        return True
    high, low = (model_sampling.percent_to_sigma(p) for p in window)
    level = float(t.flatten()[0])
    return low * _ROUNDING < level <= high * _ROUNDING


def _log_report(
    report: AttentionReport, depth: int, after_run: Callable[[AttentionReport, int, float], None] | None
) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper: one line in the log after each run, a warning where nothing became sparse."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        report.reset()
        start, complete = time.perf_counter(), False
        try:
            result = executor(*args, **kwargs)
            complete = True
            return result
        finally:
            if after_run is not None:
                after_run(report, depth, time.perf_counter() - start)
            # A run that was stopped may have ended before the first call, which is nobody's fault.
            if complete and not report.sparse and not report.warned - NO_REASONS:
                report.warn("nothing sparse", _why_none(report))
            else:
                log.info("Efficient-vDiT: %s", report.summary())

    return wrapper


def _why_none(report: AttentionReport) -> str:
    if report.dense:
        return report.summary()
    return (
        "no attention call came by: another node replaces the attention of this model (patch it before this node, "
        "or leave it out), or this ComfyUI passes no attention hook to it."
    )
