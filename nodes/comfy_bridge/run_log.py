"""What a run says in the log: one line of what was sparse, a warning where nothing was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...efficient_vdit_core.attention.report.summary import describe_measure
from .hook import WRAPPER_KEY, Hook
from .measure import why_not_twice
from .replaced_attention import none_asked, why_none_asked

log = logging.getLogger("efficient_vdit")

# Warnings that do not say why nothing became sparse.
NO_REASONS = {"scaled", "caution", "parts", "residual", "residual of another size", "second model"}


def log_report(hook: Hook) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper: one line in the log after each run, a warning where nothing became sparse."""
    report = hook.report

    def wrapper(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        report.reset()
        hook.clips, hook.running, hook.asked = len(noise), True, False
        guider = executor.class_obj
        hook.why_once = why_not_twice(guider.model_patcher, guider.model_options, WRAPPER_KEY)
        if report.measure is not None:
            report.measure.refused = hook.why_once
        start, complete = time.perf_counter(), False
        try:
            result = executor(noise, *args, **kwargs)
            complete = True
            return result
        finally:
            try:
                _tell(hook, complete, time.perf_counter() - start, guider.model_patcher)
            finally:
                for own in (hook, *hook.second_hooks):
                    own.forget()
                hook.running, hook.second_hooks = False, []

    told: Any = wrapper
    told.hook = hook
    return told


def _tell(hook: Hook, complete: bool, taken: float, model: Any) -> None:
    """To the nodes and in the log. ``complete``: whether the run of ``model``, of ``taken`` seconds, came to its end."""
    for own in (hook, *hook.second_hooks):
        own.report.seconds = taken
        if own.report.sparse or (complete and own.asked):  # else the page keeps the last run's
            own.after_run()
    _log(hook, complete, model)
    for second in hook.second_hooks:
        log.info("Efficient-vDiT, of the run's second model: %s", second.report.summary())


def _log(hook: Hook, complete: bool, model: Any) -> None:
    """A run that was stopped may have ended before the first call, and one without steps asks for nothing: neither is
    anybody's fault."""
    report = hook.report
    if complete and not hook.asked:
        log.info("Efficient-vDiT: no step was sampled.")
        return
    if complete and not report.sparse and not report.warned - NO_REASONS:
        if none_asked(report.dense):
            report.unasked = f"no self-attention call over the video came by: {why_none_asked(model, hook.family)}"
        report.warn("nothing sparse", report.unasked or "; ".join([report.summary(), *report.advice()]))
    else:
        log.info("Efficient-vDiT: %s", report.summary())
    if report.measure is not None:
        log.info("Efficient-vDiT: %s", describe_measure(report))
