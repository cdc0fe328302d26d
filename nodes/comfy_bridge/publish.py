"""Tells each forward of a MODEL where its video tokens stand and what its attention does, before it begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention.dense_call import DenseCall
from ...efficient_vdit_core.attention.hook.state import FORWARD_KEY, CallCounter, ForwardState
from ...efficient_vdit_core.attention.report.measure import StepMeasure
from ...efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from .families import uncompiled
from .forward import call_shape, forward_state
from .hook import WRAPPER_KEY, Hook, beneath, take_off
from .measure import computed_twice, renewal_timed
from .model_call import ModelCall, around_model
from .replaced_blocks import counting_blocks
from .second_model import hook_in_charge, leave_alone, without
from .window import Window, branches_of, step_of, steps_of, whole_steps, why_windows_move


def install(model: Any, hook: Hook) -> Any:
    """A clone of MODEL with ``hook`` on it; one that the MODEL has already makes way."""
    patched = model.clone()
    hook.made_for = weakref.ref(patched.model)
    options = patched.model_options["transformer_options"]
    # A second plan takes the place of the first: two of them cannot both decide about one call. Where another node
    # stands between them, the first stays in the chain and leaves alone what it does not own.
    options[OVERRIDE] = hook.over(beneath(options.get(OVERRIDE)))
    take_off(patched)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, publish_layout(hook))
    return patched


def publish_layout(hook: Hook) -> Any:
    """An APPLY_MODEL wrapper: tells the override where the video tokens of this forward stand and whether it acts, and
    settles what it will do.

    It runs before whatever ComfyUI compiles or records of the model. Our override is put on top of what it finds, at
    each forward: a node behind ours may have put its own in our place.
    """

    def publish(call: ModelCall) -> Any:
        acting = hook_in_charge(call.model, hook)
        if acting is None:
            return leave_alone(call, hook).run()
        acting.run.asked = True
        state = _state(acting, call, hook.run.clips)
        found = call.options.get(OVERRIDE)
        call.options[OVERRIDE] = acting.over(found if acting is hook else without(found, hook))
        state = _prepared(acting, state, call)

        def run(state: ForwardState) -> Tensor:
            options = {**counting_blocks(call.options, state), FORWARD_KEY: state}
            return replace(call, options=counted_anew(options, state) if torch.is_grad_enabled() else options).run()

        measure = acting.report.measure
        if measure is not None and acting.settles:
            if _wanted(measure, acting.window, state, call):
                return computed_twice(measure, run, state, call.x.device)
            if measure.warm and state.renews:
                return renewal_timed(measure, run, state, call.x.device)
        if acting.around is not None:
            return acting.around(lambda: run(state.again()))
        return run(state)

    wrapper = around_model(publish)
    wrapper.hook = hook
    return wrapper


def counted_anew(options: dict[str, Any], state: ForwardState) -> dict[str, Any]:
    """``options`` under which the model counts its layers anew where a training step has it computed again, as gradient
    checkpointing does."""

    def forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with state.counter.anew():
            return executor(*args, **kwargs)

    wrappers = options.get("wrappers", {})
    of_model = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), WRAPPER_KEY: [forward]}
    return {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: of_model}}


def _state(hook: Hook, call: ModelCall, clips: int) -> ForwardState:
    """Where the tokens of this forward stand, and whether and how it is sparse, in a run of so many clips."""
    report, sampling, options, t = hook.report, call.model.model_sampling, call.options, call.t
    network = uncompiled(call.model.diffusion_model)
    state = forward_state(hook.family, network, call.x, call.c_crossattn, call.conds, hook.stack)
    if state.layout is None:
        report.warn("unknown layout", f"the attention stays dense: {state.reason}.")
    elif why := hook.window.why_outside(sampling, options, t):
        later = hook.preparation.residual is not None and state.active and hook.window.comes(sampling, options, t)
        state = replace(state, later=later, reason=why)
        if again := hook.window.why_dense_again(sampling, options):
            report.note("dense again", again)
    if hook.caution:
        report.warn("caution", hook.caution)
    if hook.preparation.placement == "rotating" or hook.preparation.residual is not None:
        branches = branches_of(options, len(call.x), clips)
        state = replace(state, step=step_of(options, t), steps=steps_of(options), branches=branches)
    if hook.preparation.residual is not None:
        why = why_windows_move(call.model, options)
        state = replace(state, whole=whole_steps(sampling, options), no_residual=why)
    return replace(state, owner=hook.preparation)


def _wanted(measure: StepMeasure, window: Window, state: ForwardState, call: ModelCall) -> bool:
    """Whether this forward is of the step that is computed twice."""
    if state.layout is None or not state.active or state.renews:
        return False
    goes_on = window.goes_on(call.model.model_sampling, call.options, call.t)
    return measure.wants(step_of(call.options, call.t), last=not goes_on)


def _prepared(hook: Hook, state: ForwardState, call: ModelCall) -> ForwardState:
    """The forward with its backends settled, and all made that its calls keep on the device."""
    if not hook.settles:
        return state
    shape = call_shape(hook.family, call.model, call.x, hook.stack)
    hook.tell_clip(state, shape)
    state = hook.preparation.before_forward(state, shape, dense_attention(state, call))
    hook.report.clock.reserve(shape.device, state.depth or 0)
    return state


def dense_attention(state: ForwardState, call: ModelCall) -> Callable[[int], DenseCall]:
    """What gives each layer's dense attention beside this forward, for those who time it; our override must be on top."""
    # What a trial calls is no call of the model: it gets the forward's options without our own override, which stands aside
    # where a node behind it kept it.
    beside = {key: value for key, value in call.options.items() if key != OVERRIDE}
    beside[FORWARD_KEY] = ForwardState(None, counter=CallCounter(busy=True))

    def dense_of(layer: int) -> DenseCall:
        options = {"transformer_options": {**beside, **state.named(layer)}}
        dense: DenseCall = call.options[OVERRIDE].asked(optimized_attention, None, options)
        return dense.as_the_file_asks(state.file_attention.get(layer), video=True)

    return dense_of
