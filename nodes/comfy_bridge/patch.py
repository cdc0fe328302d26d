"""Puts sparse attention into a MODEL through ComfyUI's own hooks: a keyed wrapper and the attention override."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention import check_backend
from ...efficient_vdit_core.attention.cost import StepCost
from ...efficient_vdit_core.attention.dense_call import DenseCall, function_name
from ...efficient_vdit_core.attention.measure import StepMeasure
from ...efficient_vdit_core.attention.override import attention_override
from ...efficient_vdit_core.attention.prepare import Preparation
from ...efficient_vdit_core.attention.report import AttentionReport
from ...efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from ...efficient_vdit_core.attention.state import FORWARD_KEY, ForwardState, Override
from ...efficient_vdit_core.attention.summary import describe_measure
from ...efficient_vdit_core.plan import TilePlan
from .families import Family, find_family, uncompiled, why_no_family
from .forward import call_shape, forward_state
from .measure import computed_twice, why_not_twice
from .window import Window, branches_of, step_of, steps_of, whole_steps, why_windows_move

log = logging.getLogger("efficient_vdit")

WRAPPER_KEY = "efficient_vdit"
# Warnings that do not say why nothing became sparse.
NO_REASONS = {"scaled", "caution", "parts", "residual", "residual of another size"}
MOST_OVERRIDES = 16  # remembered; a node that makes a new one for each step must not fill the memory

AfterRun = Callable[[AttentionReport, int, float], None]


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
    after_run: AfterRun | None = None,
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
        after_run: called after each sampling with its counts, the number of layers, and the seconds it took.

    Raises:
        ValueError: the window is empty, the plan is for another model, the backend cannot run here, or the model's
            VAE has no chunk heads, which ``placement`` asks for.
    """
    window = window or Window()
    window.check()
    if backend != "auto":
        check_backend(backend, model.load_device)
    diffusion_model = uncompiled(model.get_model_object("diffusion_model"))
    family = find_family(diffusion_model)
    why = why_no_family(diffusion_model) if family is None else family.why_no_hook()
    if family is None or why:
        log.warning("Efficient-vDiT: %s stays dense: %s.", type(diffusion_model).__name__, why)
        return model.clone()
    depth = family.depth(diffusion_model)
    plan.check_fits(family=family.name, layers=depth, heads=family.head_count(diffusion_model))
    _check_dense_layers(plan, depth)
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
        family, window, preparation, None, family.caution(diffusion_model), family.token_weights(diffusion_model)
    )
    patched = install(model, hook)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, _log_report(hook, depth, after_run))
    return patched


@dataclass(eq=False)
class Hook:
    """What Sparse Attention has put into one MODEL: the plan made ready, and the overrides that follow it.

    ``make``: the override over another node's, default the sparse one. A search and a rank put their own here, which
    take tensors only and settle nothing beforehand. ``weights`` as in ``StepCost``, 0 = not asked for.
    """

    family: Family
    window: Window
    preparation: Preparation
    make: Callable[[Override | None], Override] | None = None
    caution: str = ""
    weights: int = 0
    made: dict[Override | None, Override] = field(default_factory=dict)

    @property
    def report(self) -> AttentionReport:
        return self.preparation.report

    @property
    def plan(self) -> TilePlan:
        return self.preparation.plan

    def over(self, current: Override | None) -> Override:
        """An override on top of ``current``, which it asks for every dense piece; ``current`` where it is ours."""
        if current is not None and getattr(current, "preparation", None) is self.preparation:
            return current
        if current not in self.made:
            if len(self.made) >= MOST_OVERRIDES:
                self.made.clear()
            chosen = self.make(current) if self.make else attention_override(self.preparation, previous=current)
            # Kept out of torch.compile: it counts calls, and each count would compile the model anew.
            override: Any = torch.compiler.disable(chosen)
            override.replaces, override.preparation = current, self.preparation
            if not self.make:
                override.container_function = _with_containers(override)
            self.made[current] = override
        return self.made[current]


def install(model: Any, hook: Hook) -> Any:
    """A clone of MODEL with ``hook`` on it; one that the MODEL has already makes way."""
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    # A second plan takes the place of the first: two of them cannot both decide about one call. Where another node
    # stands between them, the first stays in the chain and leaves alone what it does not own.
    previous = options.get(OVERRIDE)
    options[OVERRIDE] = hook.over(getattr(previous, "replaces", previous))
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, _publish_layout(hook))
    return patched


def dense() -> Preparation:
    """For a hook that only tells where the tokens stand."""
    return Preparation(TilePlan.uniform(None), AttentionReport())


def hook_of(model: Any) -> Hook | None:
    """What Sparse Attention has put into a MODEL, whatever other nodes did to its override since."""
    wrappers = model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(WRAPPER_KEY, [])
    return getattr(wrappers[-1], "hook", None) if wrappers else None


def _with_containers(override: Override) -> Override:
    """The override for q, k, v in containers; ComfyUI gives it no function to fall back on, so it brings its own."""

    def container_function(q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        return override(optimized_attention, q, k, v, heads, *args, **kwargs)

    return container_function


def _check_dense_layers(plan: TilePlan, depth: int) -> None:
    for edge in {edge for pair in plan.dense_layers for edge in pair}:
        if not -depth <= edge < depth:
            raise ValueError(
                f"dense_blocks or the plan names layer {edge}, but the model has {depth} layers: 0 to {depth - 1}, or -{depth} "
                "to -1 counted from the end. Correct whichever it is."
            )


def _publish_layout(hook: Hook) -> Callable[..., Any]:
    """An APPLY_MODEL wrapper: tells the override where the video tokens of this forward stand and whether it acts, and
    settles what it will do.

    It runs before whatever ComfyUI compiles or records of the model. Our override is put on top of what it finds, at
    each forward: a node behind ours may have put its own in our place.
    """
    report = hook.report

    def wrapper(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        *more: Any,
        **conds: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        base_model = executor.class_obj
        diffusion_model = uncompiled(base_model.diffusion_model)
        state = forward_state(hook.family, diffusion_model, x, c_crossattn, conds)
        report.layout = state.layout
        if state.layout is None:
            report.warn("unknown layout", f"the attention stays dense: {state.reason}.")
        elif why := hook.window.why_outside(base_model.model_sampling, options, t):
            if hook.preparation.residual is not None:
                state.later = state.active and hook.window.comes(base_model.model_sampling, options, t)
            state.active, state.reason = False, why
        if hook.caution:
            report.warn("caution", hook.caution)
        if hook.preparation.placement == "rotating" or hook.preparation.residual is not None:
            state.step, state.steps = step_of(options, t), steps_of(options)
            state.branches = branches_of(options, len(x))
        if hook.preparation.residual is not None:
            state.whole = whole_steps(base_model.model_sampling, options)
            state.no_residual = why_windows_move(base_model, options)
        state.owner = hook.preparation
        options[OVERRIDE] = hook.over(options.get(OVERRIDE))
        _prepare(hook, base_model, state, options, x)

        def run(state: ForwardState) -> Tensor:
            own = {**options, FORWARD_KEY: state}
            return executor(x, t, c_concat, c_crossattn, control, own, *more, **conds)

        if report.measure is not None and _wanted(report.measure, hook.window, state, base_model, options, t):
            return computed_twice(report.measure, run, state, x.device)
        return run(state)

    wrapper.hook = hook  # pyright: ignore[reportFunctionMemberAccess]
    return wrapper


def _wanted(
    measure: StepMeasure, window: Window, state: ForwardState, base_model: Any, options: dict[str, Any], t: Tensor
) -> bool:
    """Whether this forward is of the step that is computed twice."""
    if state.layout is None or not state.active or (state.residual is not None and state.residual.renew):
        return False
    return measure.wants(step_of(options, t), last=not window.goes_on(base_model.model_sampling, options, t))


def _prepare(hook: Hook, base_model: Any, state: ForwardState, options: dict[str, Any], x: Tensor) -> None:
    """Settles the forward's backends, and makes all that its calls keep on the device."""
    if hook.make is not None:
        return
    previous: Override | None = options[OVERRIDE].replaces
    # What a trial calls is no call of the model: it gets the forward's options without our own.
    beside = {"transformer_options": {key: value for key, value in options.items() if key != OVERRIDE}}

    dense = DenseCall(optimized_attention, previous, None, beside, function_name(previous) if previous else "")

    def dense_of(layer: int) -> DenseCall:
        return dense.as_the_file_asks(state.file_attention.get(layer), video=True)

    shape = call_shape(hook.family, base_model, x)
    if state.layout is not None and state.depth:
        hook.report.cost = StepCost(state.layout, shape.heads, shape.head_dim, state.depth, hook.weights)
    hook.preparation.before_forward(state, [shape], dense_of)
    hook.report.clock.reserve(shape.device, state.depth or 0)


def _log_report(hook: Hook, depth: int, after_run: AfterRun | None) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper: one line in the log after each run, a warning where nothing became sparse."""
    report = hook.report

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        report.reset()
        if report.measure is not None:
            report.measure.refused = why_not_twice(executor.class_obj, WRAPPER_KEY)
        start, complete = time.perf_counter(), False
        try:
            result = executor(*args, **kwargs)
            complete = True
            return result
        finally:
            report.seconds = time.perf_counter() - start
            if after_run is not None:
                after_run(report, depth, report.seconds)
            # A run that was stopped may have ended before the first call, which is nobody's fault.
            if complete and not report.sparse and not report.warned - NO_REASONS:
                report.warn("nothing sparse", _why_none(report))
            else:
                log.info("Efficient-vDiT: %s", report.summary())
            if report.measure is not None:
                log.info("Efficient-vDiT: %s", describe_measure(report))
            hook.preparation.forget()

    return wrapper


def _why_none(report: AttentionReport) -> str:
    if report.dense:
        return report.summary()
    return (
        "no attention call came by: another node replaces the attention of this model (patch it before this node, "
        "or leave it out), or this ComfyUI passes no attention hook to it."
    )
