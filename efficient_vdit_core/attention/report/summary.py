"""A run's attention counts and times in words."""

from __future__ import annotations

from .cost import StepCost
from .report import AttentionReport

NO_CALLS = "No attention call was seen: nothing was sampled with this model yet, or its attention passes no hook."
_MOST_TRIALS = 3  # lines about them


def summarize_run(report: AttentionReport) -> tuple[str, bool]:
    """Several lines about the last run, and whether anything became sparse.

    The one share of FLOPs takes every self-attention call over the video as equally large, a sparse one by its density.
    """
    counts, cost = report.snapshot(), report.cost
    sparse, density, ours = counts.sparse, counts.density, counts.dense_over_video
    if not sparse and not counts.dense:
        return f"WARNING: {counts.unasked}" if counts.unasked else NO_CALLS, False
    lines = [f"Self-attention over the video: {counts.calls} calls, {sparse} of them sparse"]
    if sparse:
        lines.append(f"  work: {density:.0%} of dense attention's FLOPs, dense calls included")
    else:
        lines.insert(0, "WARNING: nothing became sparse; this run was as slow as without Sparse Attention.")
        lines += [f"  {counts.unasked}"] if counts.unasked else []
    lines += _times(report, density)
    if ours:
        lines.append("  dense: " + ", ".join(f"{count} {reason}" for reason, count in ours))
        lines += [f"    {advice}" for advice in report.advice()]
    if counts.computed:
        lines.append("  computed by " + ", ".join(f"{name} ({count})" for name, count in counts.computed))
    lines += [f"  a trial's ms for {pattern}: {times}" for pattern, times in list(counts.trials.items())[:_MOST_TRIALS]]
    if counts.other:
        lines.append(
            "Other attention, always dense: " + ", ".join(f"{count} {reason}" for reason, count in counts.other)
        )
    if cost is not None:
        lines += describe_bound(cost, density)
    if report.measure is not None:
        lines.append(describe_measure(report))
    return "\n".join(lines), bool(sparse)


def describe_bound(cost: StepCost, density: float) -> list[str]:
    """What share of this clip's sequence and step the plan touches, and what follows for the whole step."""
    layout = cost.layout
    beside = layout.prefix + layout.suffix
    lines = [
        f"The clip: {layout.grid.t} latent frames of {layout.grid.tokens_per_frame} tokens, {cost.video_share:.0%} of a "
        f"sequence of {layout.tokens}"
        + (f"; {beside} other tokens (text, audio, references) see and are seen by all" if beside else "")
    ]
    share, bound = cost.attention_share(), cost.bound(density)
    lines.append(
        f"  attention is {share:.0%} of a dense step's FLOPs here: a step at {density:.0%} of it is {_at_most(bound)}, by FLOPs"
    )
    return lines


def describe_measure(report: AttentionReport) -> str:
    """What a step took dense and sparse in the last run, or why none was measured; "" where none was to be."""
    measure = report.measure
    if measure is None:
        return ""
    if not report.sparse:
        return "Not measured: no step became sparse"
    if not measure.forwards:
        return f"Not measured: {measure.refused or 'the run ended before its second sparse step'}"
    forwards = f", {measure.forwards} forwards of the model" if measure.forwards > 1 else ""
    steps = f"a dense step {_seconds(measure.dense)}, a sparse step {_seconds(measure.sparse)}"
    if measure.every:
        renewing = _seconds(measure.renewing_step) if measure.renewals else "longer than a dense one"
        steps += f", every {_ordinal(measure.every)} one, which renews the residual, {renewing}"
    gain = f": {_faster(measure.dense / measure.mean_step)}" if measure.mean_step else ""
    return f"Measured in this run: {steps}{gain} (step {(measure.step or 0) + 1}{forwards}, computed both ways)"


def shorten_measure(report: AttentionReport) -> str:
    """The same for a node, which has room for two short lines: the gain first."""
    measure = report.measure
    if measure is None or not report.sparse or not measure.forwards:
        return describe_measure(report)
    gain = f"{_faster(measure.dense / measure.mean_step)}: " if measure.mean_step else ""
    renewing = f", renewing {_seconds(measure.renewing_step)}" if measure.renewals else ""
    return f"{gain}dense {_seconds(measure.dense)}, sparse {_seconds(measure.sparse)}{renewing}"


def _ordinal(number: int) -> str:
    """2nd, 3rd, 4th, ..."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _faster(gain: float) -> str:
    return f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x slower"


def _at_most(gain: float) -> str:
    """Steps that renew a cached residual compute more than dense attention does."""
    return f"{'at most' if gain >= 1 else 'at least'} {_faster(gain)}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def _times(report: AttentionReport, density: float) -> list[str]:
    times = report.clock.times()
    if times is None:
        return []
    spent = times.sparse + times.dense
    whole = f" of the run's {report.seconds:.2f} s" if report.seconds else ""
    if not times.sparse:
        return [f"  time: {spent:.2f} s{whole}, all dense"]
    lines = [f"  time: {spent:.2f} s{whole}; sparse {times.sparse:.2f} s, dense {times.dense:.2f} s"]
    if times.measured:
        lines.append(
            f"  all dense: {times.all_dense:.2f} s, from the dense calls of this run, so this attention was "
            f"{_faster(times.all_dense / spent)}"
        )
    else:
        lines.append(
            f"  attention alone {_at_most(1 / density)}, by FLOPs: no dense call of this size was timed in this run"
        )
    return lines
