"""Two MODELs in one run: ComfyUI's Dual Model CFG Guider runs the negative one with the wrappers of the first."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

from comfy.patcher_extension import CallbacksMP

from ...efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from .hook import WRAPPER_KEY, Hook, HookRun, followed_by, hook_of
from .model_call import ModelCall

log = logging.getLogger("efficient_vdit")


def hook_in_charge(model: Any, hook: Hook) -> Hook | None:
    """The hook that a forward of ``model``, a BaseModel, follows in a run of the MODEL that has ``hook``: its own MODEL's,
    None where that has none. GPUs that share out a batch run copies of the model, which have the same hook."""
    patcher = getattr(model, "current_patcher", None)
    own = hook if patcher is None or hook.made_for() is model else hook_of(patcher)
    if own is not None and own is not hook and own not in hook.run.second_hooks:
        if own.report.measure is not None:
            own.report.measure.refused = hook.run.why_once
        hook.run.second_hooks.append(own)
    return own


def leave_alone(call: ModelCall, hook: Hook) -> ModelCall:
    """A forward of a MODEL without Sparse Attention as it would be by itself."""
    hook.report.warn(
        "second model", "the run samples with a second model, which has no Sparse Attention and stays dense."
    )
    options = dict(call.options)
    override = without(options.pop(OVERRIDE, None), hook)
    return replace(call, options=options if override is None else {**options, OVERRIDE: override})


def without(override: Any, hook: Hook) -> Any:
    """The override that the first MODEL's ``hook`` was put over, where it is on top; None where there is none."""
    return override.replaces if followed_by(override) is hook.preparation else override


def tell_where_nobody_asks(patched: Any, hook: Hook) -> None:
    """Has a run that samples with this MODEL, and in which none of its wrappers ever act, end with a warning."""

    def before(_: Any) -> None:
        if not hook.run.running:
            hook.report.reset()
            hook.run = HookRun(beside=True)

    def after(_: Any) -> None:
        # ComfyUI cleans up while an error or a Cancel passes by too; then there may have been nothing to ask yet.
        if hook.run.beside and not hook.run.asked and sys.exc_info()[0] is None:
            log.warning(
                "Efficient-vDiT: the plan of this run's second model was not asked for. Where both are the same loaded model, the first "
                "one's plan held; else the second stayed dense, for Dual Model CFG Guider asks the wrappers of its first model alone: "
                "put Sparse Attention on both."
            )
        hook.run.beside = False

    for kind, function in ((CallbacksMP.ON_PRE_RUN, before), (CallbacksMP.ON_CLEANUP, after)):
        patched.add_callback_with_key(kind, WRAPPER_KEY, function)
