"""What a run says in the log: one line of what was sparse, a warning where nothing was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...efficient_vdit_core.attention.report.report import AttentionReport
from ...efficient_vdit_core.attention.report.summary import describe_measure
from .hook import WRAPPER_KEY, Hook, HookRun
from .measure import why_not_twice
from .replaced_attention import none_asked, why_none_asked

log = logging.getLogger("efficient_vdit")

STAYS_DENSE = "Efficient-vDiT: %s stays dense: %s."

# Warnings that do not say why nothing became sparse.
NO_REASONS = {"much sparser", "caution", "parts", "residual", "residual of another size", "second model"}


def log_report(hook: Hook) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper: one line in the log after each run, a warning where nothing became sparse."""
    report = hook.report

    def wrapper(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        report.reset()
        guider = executor.class_obj
        why_once = why_not_twice(guider.model_patcher, guider.model_options, WRAPPER_KEY)
        outer = hook.run  # of a run that samples within a run; else of none
        hook.run = HookRun(clips=len(noise), running=True, why_once=why_once)
        if report.measure is not None:
            report.measure.refused = why_once
        start, complete = time.perf_counter(), False
        try:
            result = executor(noise, *args, **kwargs)
            complete = True
            return result
        finally:
            try:
                _tell(hook, complete, time.perf_counter() - start, guider.model_patcher)
            finally:
                for own in (hook, *hook.run.second_hooks):
                    own.forget()
                hook.run = outer

    told: Any = wrapper
    told.hook = hook
    return told


def log_dense(name: str, why: str, after_run: Callable[[AttentionReport, int], None] | None) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper of a MODEL of the class ``name`` that stays dense as a whole: says ``why`` after each run, in
    the log and to ``after_run``. In the log from the second run on: before the first one the node itself has said it."""
    runs = 0

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        start = time.perf_counter()
        result = executor(*args, **kwargs)
        runs += 1
        if runs > 1:
            log.warning(STAYS_DENSE, name, why)
        if after_run is not None:
            after_run(AttentionReport(unasked=f"{name}: {why}", seconds=time.perf_counter() - start), 0)
        return result

    return wrapper


def _tell(hook: Hook, complete: bool, taken: float, model: Any) -> None:
    """To the nodes and in the log. ``complete``: whether the run of ``model``, of ``taken`` seconds, came to its end."""
    if complete and _unexplained(hook) and none_asked(hook.report.dense):
        hook.report.unasked = f"no self-attention call over the video came by: {why_none_asked(model, hook.family)}"
    for own in (hook, *hook.run.second_hooks):
        own.report.seconds = taken
        if own.report.sparse or (complete and own.run.asked):  # else the page keeps the last run's
            own.after_run()
    _log(hook, complete)
    for second in hook.run.second_hooks:
        log.info("Efficient-vDiT, of the run's second model: %s", second.report.summary())


def _log(hook: Hook, complete: bool) -> None:
    """A run that was stopped may have ended before the first call, and one without steps asks for nothing: neither is
    anybody's fault."""
    report = hook.report
    if complete and not hook.run.asked:
        log.info("Efficient-vDiT: no step was sampled.")
        return
    if complete and _unexplained(hook):
        report.warn("nothing sparse", report.unasked or "; ".join([report.summary(), *report.advice()]))
    else:
        log.info("Efficient-vDiT: %s", report.summary())
    if report.measure is not None:
        log.info("Efficient-vDiT: %s", describe_measure(report))


def _unexplained(hook: Hook) -> bool:
    """Whether nothing became sparse in a run with steps, and no warning of it says why."""
    report = hook.report
    return hook.run.asked and not report.sparse and not report.warned - NO_REASONS
