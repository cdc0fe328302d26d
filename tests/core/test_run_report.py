"""What a run reports: counts, reasons, and times that are those of the calls."""

import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.hook.override import make_attention_override
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.clock import DENSE, SPARSE, AttentionClock, Tally
from efficient_vdit_core.attention.report.cost import StepCost
from efficient_vdit_core.attention.report.measure import StepMeasure
from efficient_vdit_core.attention.report.reason_names import CROSS_ATTENTION, MASKED
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.report.summary import (
    describe_bound,
    describe_measure,
    shorten_measure,
    summarize_run,
)
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
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


def test_a_dense_run_says_why_in_a_line():
    assert (ran(1, None, 1).snapshot().calls, ran(1, None, 1).snapshot().why_dense) == (3, "")
    assert (ran(None, None).snapshot().calls, ran(None, None).snapshot().why_dense) == (2, "2 full in the plan")
    beside = AttentionReport()
    assert beside.snapshot().why_dense == ""
    beside.add_dense(CROSS_ATTENTION)
    assert beside.snapshot().why_dense == f"1 {CROSS_ATTENTION}"
    assert AttentionReport(unasked="its attention asks nobody").snapshot().why_dense == "its attention asks nobody"


def test_every_call_is_in_the_summary():
    text, sparse = summarize_run(ran(1, None, 1))
    density = TilePattern(1).density(4)
    work = f"  work: {(2 * density + 1) / 3:.0%} of dense attention's FLOPs, dense calls included"
    assert sparse and text.splitlines()[:2] == ["Self-attention over the video: 3 calls, 2 of them sparse", work]
    assert "  dense: 1 full in the plan" in text and "  computed by attention_sdpa (3)" in text
    assert (
        "Other attention, always dense: 1 cross-attention" in text and ", from the dense calls of this run, so" in text
    )


def test_the_counts_of_another_process_are_added():
    """As JSON between them; two forwards and one."""
    here, whole = ran(1, None), ran(1, None, 1)
    here.add_counts(json.loads(json.dumps(ran(1).counts())))
    whole.add_dense(CROSS_ATTENTION)  # each of the two others has one
    assert here.counts() == whole.counts() and here.summary() == whole.summary()


def test_a_run_without_dense_calls_claims_a_bound_and_no_measurement():
    text, _ = summarize_run(ran(1, 1))
    bound = 1 / TilePattern(1).density(4)
    assert f"attention alone at most {bound:.2f}x faster, by FLOPs: no dense call of this size was timed" in text
    assert "all dense" not in text


def test_more_work_than_dense_attention_s_is_called_slower():
    """As of steps that renew a cached residual."""
    report = ran(1)
    report.density_sum, report.cost = 1.25, StepCost(LAYOUT, 2, 8, 1, 100)
    text, _ = summarize_run(report)
    assert "attention alone at least 1.25x slower, by FLOPs" in text
    assert f"a step at 125% of it is at least {1 / report.cost.bound(1.25):.2f}x slower, by FLOPs" in text


def test_the_bound_is_amdahl_s_for_this_clip():
    """MiniMax-H3, 1344x768, 5 s: 37 latent frames of 1008 tokens behind 714 of text and sound; 19.27 billion weights
    meet each token. Under 8:29 a step becomes at most 1.50x faster."""
    cost = StepCost(TokenLayout(TokenGrid(37, 24, 42), prefix=714), 56, 128, 50, 19_270_000_000)
    assert cost.attention == pytest.approx(2.07e15, rel=0.01) and cost.matrices == pytest.approx(1.46e15, rel=0.01)
    density = TilePattern(8).flop_density(cost.layout.grid, 714)
    assert cost.attention_share() == pytest.approx(0.59, abs=0.005) and cost.bound(density) == pytest.approx(
        1.50, abs=0.01
    )
    assert cost.bound(density, attention_rate=0.5) > cost.bound(density) > cost.bound(1.0) == 1.0
    first, second = describe_bound(cost, density)
    assert "37 latent frames of 1008 tokens, 98% of a sequence of 38010; 714 other tokens" in first
    assert second.endswith("a step at 43% of it is at most 1.50x faster, by FLOPs")
    reference = StepCost(TokenLayout(TokenGrid(37, 24, 42), prefix=714 + 37 * 1008 + 414), 56, 128, 50, 19_270_000_000)
    assert reference.bound(TilePattern(1).flop_density(reference.layout.grid, reference.layout.prefix)) < 1.25


def test_nothing_sparse_is_a_warning():
    text, sparse = summarize_run(ran(None, None))
    assert not sparse and text.startswith("WARNING") and "all dense" in text
    text, sparse = summarize_run(AttentionReport())
    assert not sparse and "No attention call was seen" in text


def test_the_report_of_a_masked_run_tells_what_to_do_and_its_one_line_stays_short():
    report = AttentionReport()
    report.add_dense(CROSS_ATTENTION)
    assert report.advice() == []
    report.add_dense(MASKED)
    (advice,) = report.advice()
    assert "LTX guide" in advice and "strength to 1" in advice and "LTXVImgToVideoInplace" in advice
    assert advice in summarize_run(report)[0]
    assert report.summary() == "0 attention calls sparse; dense: 1 cross-attention, 1 masked"


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


def measured(*forwards: tuple[float, float], **about) -> str:
    """The report's last line where the second step's forwards took these seconds, dense and sparse."""
    report = ran(1, 1)
    report.measure = StepMeasure(**about)
    assert not report.measure.wants(0, last=False)
    for dense, sparse in forwards:
        assert report.measure.wants(1, last=False)
        report.measure.add(dense, sparse)
    return summarize_run(report)[0].splitlines()[-1]


def test_a_measured_step_is_told_in_seconds():
    line = "Measured in this run: a dense step 12.3 s, a sparse step 5.1 s: 2.41x faster (step 2, computed both ways)"
    assert measured((12.3, 5.1)) == line
    both = measured((100.0, 40.0), (50.0, 20.0))
    assert "a dense step 150 s, a sparse step 60 s: 2.50x faster (step 2, 2 forwards of the model, computed" in both
    assert "a dense step 0.05 s, a sparse step 0.1 s: 2.00x slower" in measured((0.05, 0.1))


def test_a_node_tells_the_gain_first_and_in_few_words():
    report = ran(1, 1)
    report.measure = StepMeasure()
    assert (
        shorten_measure(report)
        == describe_measure(report)
        == "Not measured: the run ended before its second sparse step"
    )
    report.measure.add(0.095, 0.121)
    assert shorten_measure(report) == "1.27x slower: dense 0.095 s, sparse 0.121 s"
    assert shorten_measure(ran(1)) == ""


def test_steps_that_renew_a_residual_count_in_the_gain():
    """A cycle of four: three steps of 2 s and one of 6 take 12 s, four dense ones of 5 s take 20."""
    report = ran(1, 1)
    report.measure = measure = StepMeasure()
    measure.add(2.5, 1.0, every=4)
    measure.add(2.5, 1.0, every=4)
    text = "Measured in this run: a dense step 5 s, a sparse step 2 s, every 4th one, which renews the residual, "
    assert describe_measure(report).startswith(f"{text}longer than a dense one (step 1, 2 forwards")
    assert shorten_measure(report) == "dense 5 s, sparse 2 s" and measure.mean_step == 0
    for seconds in (2.9, 3.1):
        measure.add_renewal(seconds)
    assert measure.mean_step == pytest.approx(3.0)
    assert describe_measure(report).startswith(f"{text}6 s: 1.67x faster (step 1, 2 forwards")
    assert shorten_measure(report) == "1.67x faster: dense 5 s, sparse 2 s, renewing 6 s"
    measure.reset()
    assert measure == StepMeasure(lock=measure.lock)


def test_where_nothing_was_measured_the_report_says_why():
    assert measured() == "Not measured: the run ended before its second sparse step"
    report = ran(None)
    report.measure = StepMeasure()
    assert summarize_run(report)[0].endswith("Not measured: no step became sparse")
    report = ran(1)
    report.measure = StepMeasure(refused="easycache")
    assert summarize_run(report)[0].endswith("Not measured: easycache") and not report.measure.wants(1, last=True)
    assert "easured in this run" not in summarize_run(ran(1))[0] and describe_measure(ran(1)) == ""


def test_one_step_is_measured_and_not_the_first_where_there_are_more():
    measure = StepMeasure()
    assert [measure.wants(step, last=step == 4) for step in (2, 2, 3, 3, 4)] == [False, False, True, True, False]
    assert not measure.cold
    measure.reset()
    assert measure.wants(4, last=True) and measure.cold
    measure.add(2.0, 1.0)
    assert measure.wants(4, last=True) and not measure.cold


def test_a_forward_beside_the_run_is_counted_nowhere():
    report, beside = AttentionReport(), AttentionReport()
    override = make_attention_override(TilePlan.uniform(1), report)
    x = torch.randn(1, LAYOUT.tokens, 16)
    for state in (
        ForwardState(LAYOUT, report=beside),
        ForwardState(LAYOUT, report=beside, reason="outside the step window"),
    ):
        for keys in (x, x[:, :5]):
            sdpa_attention(x, keys, keys, 2, transformer_options={OVERRIDE_KEY: override, FORWARD_KEY: state})
    assert (report.sparse, report.dense, report.clock.times()) == (0, {}, None)
    assert beside.sparse == 1 and beside.dense == {"cross-attention": 2, "outside the step window": 1}


def timed(**about) -> AttentionReport:
    """Two dense calls of 2 s each and three sparse ones of 0.5 s, all of one shape."""
    report = AttentionReport(sparse=3, density_sum=1.2, **about)
    report.dense["full in the plan"] = 2
    report.clock.tallies[DENSE, (1, 9)] = Tally(2, 4.0, 2.0)
    report.clock.tallies[SPARSE, (1, 9)] = Tally(3, 1.5, 1.2)
    return report


def test_the_gain_of_the_attention_is_told_from_the_seconds_of_all_its_calls():
    text, _ = summarize_run(timed(seconds=8.0))
    assert "time: 5.50 s of the run's 8.00 s; sparse 1.50 s, dense 4.00 s" in text
    assert "all dense: 10.00 s, from the dense calls of this run, so this attention was 1.82x faster" in text


def test_a_run_that_stayed_dense_tells_its_time_without_a_gain():
    report = AttentionReport()
    report.dense["full in the plan"] = 1
    report.clock.tallies[DENSE, (1, 9)] = Tally(1, 4.0, 1.0)
    assert "  time: 4.00 s, all dense" in summarize_run(report)[0].splitlines()


def test_the_trials_of_the_backends_are_in_the_summary():
    report = timed()
    report.add_trial("1:3", "frames 1.00")
    assert "  a trial's ms for 1:3: frames 1.00" in summarize_run(report)[0].splitlines()


def test_tokens_before_and_behind_the_video_are_counted_together():
    cost = StepCost(TokenLayout(LAYOUT.grid, prefix=2, suffix=1), 2, 8, 1, 100)
    assert "; 3 other tokens" in describe_bound(cost, 0.5)[0]


def test_nothing_of_a_run_is_in_the_report_of_the_next():
    measure = StepMeasure()
    report = timed(seconds=8.0, layout=LAYOUT, cost=StepCost(LAYOUT, 2, 8, 1, 100), measure=measure)
    report.computed["frames"] += 1
    report.add_trial("1:3", "frames 1.00")
    report.warn("a length", "said once a run")
    report.note("a length", "said once a run")
    assert measure.wants(0, last=True)
    measure.add(2.0, 1.0)
    report.reset()
    unused = StepMeasure(lock=measure.lock)
    assert report == AttentionReport(clock=report.clock, measure=unused, lock=report.lock)
    assert report.clock.times() is None


class OfOneDevice:
    """Stands for a CUDA event: it belongs to the device that it was first recorded on."""

    current = torch.device("cuda", 0)

    def __init__(self, enable_timing=False):
        self.device = None

    def record(self, stream=None):
        at = stream or OfOneDevice.current
        assert self.device in (None, at), "Event device does not match recording stream's device"
        self.device = at

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        assert self.device == end.device
        return 1000.0


def test_gpus_that_share_a_report_take_their_times_by_events_of_their_own(monkeypatch):
    """As ComfyUI's clones of one model on several GPUs do."""

    @contextmanager
    def on(device):
        OfOneDevice.current = device
        yield

    monkeypatch.setattr(torch.cuda, "Event", OfOneDevice)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    clock = AttentionClock()
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    for _ in range(2):
        for gpu in gpus:
            clock.reserve(gpu, calls=2)
            for _ in range(3):
                with clock.taking(SPARSE, SimpleNamespace(shape=(1, 9), is_cuda=True, device=gpu)):
                    pass
    times = clock.times()
    assert times and times.sparse == pytest.approx(12.0) and clock.tallies[SPARSE, (1, 9)].calls == 12
