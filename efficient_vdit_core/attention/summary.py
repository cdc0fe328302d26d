"""A run's attention counts and times in words."""

from __future__ import annotations

from .report import AttentionReport

# Not self-attention over the video, so no plan could make it sparse.
NOT_OURS = ("cross-attention", "another sequence length", "no token grid", "text or audio alone")


def summarize_run(report: AttentionReport) -> tuple[str, bool]:
    """Several lines about the last run, and whether anything became sparse.

    The FLOP share takes every self-attention call over the video as equally large, and a sparse one by its density.
    """
    with report.lock:
        sparse, density_sum, reasons = report.sparse, report.density_sum, report.dense.most_common()
    ours = [(reason, count) for reason, count in reasons if reason not in NOT_OURS]
    others = [(reason, count) for reason, count in reasons if reason in NOT_OURS]
    dense = sum(count for _, count in ours)
    if not sparse and not reasons:
        return (
            "No attention call was seen: nothing was sampled with this model yet, or its attention passes no hook.",
            False,
        )
    lines = [f"Self-attention over the video: {sparse + dense} calls"]
    if sparse:
        share = (density_sum + dense) / (sparse + dense)
        lines.append(f"  sparse: {sparse} calls at mean density {density_sum / sparse:.2f}")
        lines.append(f"  FLOPs: {share:.0%} of dense, {1 / share:.2f}x fewer")
    else:
        lines.insert(0, "WARNING: nothing became sparse; this run was as slow as without Sparse Attention.")
    lines += _times(report)
    if ours:
        lines.append("  dense: " + ", ".join(f"{count} {reason}" for reason, count in ours))
    if others:
        lines.append("Other attention, always dense: " + ", ".join(f"{count} {reason}" for reason, count in others))
    return "\n".join(lines), bool(sparse)


def _times(report: AttentionReport) -> list[str]:
    times = report.clock.times()
    if times is None:
        return []
    spent = times.sparse + times.dense
    if not times.sparse:
        return [f"  time: {spent:.2f} s, all dense"]
    basis = (
        "from the dense calls of this run"
        if times.measured
        else "estimated from FLOPs; no dense call of the same size was timed"
    )
    return [
        f"  time: {spent:.2f} s, of which sparse {times.sparse:.2f} s and dense {times.dense:.2f} s",
        f"  all dense: {times.all_dense:.2f} s ({basis}), so {times.all_dense / spent:.2f}x faster",
    ]
