"""The clock of the attention: what it estimates, and that a GPU never waits for it."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from efficient_vdit_core.attention.report.clock import DENSE, SPARSE, AttentionClock, Tally


class NumberedEvent:
    """Stands for a CUDA event: the n-th record of a test is made at second n."""

    records = 0
    waits = 0  # of the host for the device
    reached = False  # whether the device has come to all that was recorded

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.second = 0

    def record(self, stream=None):
        NumberedEvent.records += 1
        self.second = NumberedEvent.records

    def query(self):
        return NumberedEvent.reached

    def synchronize(self):
        NumberedEvent.waits += 1

    def elapsed_time(self, end):
        return 1000.0 * (end.second - self.second)


@pytest.fixture
def queries(monkeypatch):
    """Of a call on a GPU whose events are numbered."""
    for name, value in (("records", 0), ("waits", 0), ("reached", False)):
        monkeypatch.setattr(NumberedEvent, name, value)
    monkeypatch.setattr(torch.cuda, "Event", NumberedEvent)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return SimpleNamespace(shape=(1, 9), is_cuda=True, device=torch.device("cuda", 0))


def attend(clock, queries, calls=1):
    for _ in range(calls):
        with clock.taking(SPARSE, queries):
            pass


def test_one_shape_without_a_dense_call_makes_the_whole_an_estimate():
    """Also where a shape that has one comes after it."""
    clock = AttentionClock()
    clock.tallies[SPARSE, (1, 5)] = Tally(4, 1.0, 1.0)
    clock.tallies[DENSE, (1, 9)] = Tally(2, 4.0, 2.0)
    clock.tallies[SPARSE, (1, 9)] = Tally(3, 1.5, 1.2)
    times = clock.times()
    assert times and not times.measured


def test_the_estimate_by_flops_divides_by_the_density():
    """Four calls of half the work took a second: dense they take two."""
    clock = AttentionClock()
    clock.tallies[SPARSE, (1, 5)] = Tally(4, 1.0, 2.0)
    times = clock.times()
    assert times and times.all_dense == pytest.approx(2.0)


def test_a_call_takes_no_longer_than_what_is_around_it():
    clock, begin = AttentionClock(), time.perf_counter()
    with clock.taking(DENSE, torch.zeros(1, 4, 8)):
        time.sleep(0.01)
    times = clock.times()
    assert times and times.dense <= time.perf_counter() - begin


def test_no_call_waits_for_the_gpu(queries):
    clock = AttentionClock()
    attend(clock, queries, calls=5)
    assert NumberedEvent.waits == 0 and len(clock.pending) == 5


def test_events_that_the_gpu_has_reached_are_read_and_used_again(queries):
    clock = AttentionClock()
    NumberedEvent.reached = True
    attend(clock, queries, calls=5)
    assert not clock.pending and len(clock.spare[queries.device]) == 2


def test_calls_that_a_gpu_had_not_finished_are_not_in_the_next_run(queries):
    clock = AttentionClock()
    attend(clock, queries)
    clock.reset()
    assert clock.times() is None


def test_a_call_begins_at_its_own_record_and_not_where_its_event_was_made(queries):
    clock = AttentionClock()
    clock.reserve(queries.device, calls=2)
    assert len(clock.spare[queries.device]) == 4
    NumberedEvent.records += 10
    attend(clock, queries)
    times = clock.times()
    assert times and times.sparse == 1.0
