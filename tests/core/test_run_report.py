"""What a run reports: counts, reasons, and times that are those of the calls."""

import time

import pytest
import torch

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.clock import DENSE, SPARSE, AttentionClock, Tally
from efficient_vdit_core.attention.override import FORWARD_KEY, ForwardState, make_attention_override
from efficient_vdit_core.attention.report import AttentionReport
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
from efficient_vdit_core.attention.summary import summarize_run
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LAYOUT = TokenLayout(TokenGrid(4, 1, 3))


def ran(*ks, layout=LAYOUT) -> AttentionReport:
    """One call for each of ``ks`` reference frames (None = full), and one cross-attention."""
    report = AttentionReport()
    override = make_attention_override(TilePlan(patterns=tuple(map(TilePattern, ks))), report)
    options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(layout)}
    x = torch.randn(1, layout.tokens, 16)
    for _ in ks:
        sdpa_attention(x, x, x, 2, transformer_options=options)
    sdpa_attention(x, x[:, :5], x[:, :5], 2, transformer_options=options)
    return report


def test_every_call_is_in_the_summary():
    text, sparse = summarize_run(ran(1, None, 1))
    density = TilePattern(1).density(4)
    first = ["Self-attention over the video: 3 calls", f"  sparse: 2 calls at mean density {density:.2f}"]
    assert sparse and text.splitlines()[:2] == first
    assert f"FLOPs: {(2 * density + 1) / 3:.0%} of dense" in text and "dense: 1 full in the plan" in text
    assert "Other attention, always dense: 1 cross-attention" in text and "(from the dense calls of this run)" in text


def test_a_run_without_dense_calls_says_that_it_estimates():
    text, _ = summarize_run(ran(1, 1))
    assert "estimated from FLOPs" in text


def test_nothing_sparse_is_a_warning():
    text, sparse = summarize_run(ran(None, None))
    assert not sparse and text.startswith("WARNING") and "all dense" in text
    text, sparse = summarize_run(AttentionReport())
    assert not sparse and "No attention call was seen" in text


def test_the_clock_takes_the_time_of_what_runs_within():
    clock, q = AttentionClock(), torch.zeros(1, 4, 8)
    with clock.taking(DENSE, q):
        time.sleep(0.03)
    with clock.taking(SPARSE, q, 0.5):
        time.sleep(0.01)
    times = clock.times()
    assert (
        times
        and 0.03 <= times.dense
        and 0.01 <= times.sparse
        and times.all_dense == pytest.approx(2 * times.dense)
        and times.measured
    )
    clock.reset()
    assert clock.times() is None


def test_the_dense_estimate_takes_calls_of_the_same_shape_and_flops_for_others():
    clock = AttentionClock()
    clock.tallies[DENSE, (1, 9)] = Tally(2, 4.0, 2.0)
    clock.tallies[SPARSE, (1, 9)] = Tally(3, 1.5, 1.2)
    times = clock.times()
    assert (
        times
        and (times.sparse, times.dense, times.measured) == (1.5, 4.0, True)
        and times.all_dense == pytest.approx(4 + 3 * 2)
    )
    clock.tallies[SPARSE, (1, 5)] = Tally(4, 1.0, 1.0)
    times = clock.times()
    assert times and not times.measured and times.all_dense == pytest.approx(4 + 6 + 1.0 / 0.25)


def test_a_new_run_starts_from_nothing():
    report = ran(1)
    report.reset()
    assert report.clock.times() is None and not report.sparse
