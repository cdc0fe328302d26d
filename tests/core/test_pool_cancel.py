"""After Cancel the ranks finish what they are at: what is asked next waits for that, and its own time begins then."""

import os
import signal
import time

import pytest
import torch
from pools import HOST, START, X, gone, launch, until

from efficient_vdit_core.parallel.pool import pending_request as request
from efficient_vdit_core.parallel.pool import session as session_module
from efficient_vdit_core.parallel.pool.faults import PoolFault
from efficient_vdit_core.parallel.pool.pool_file import default_pool_file
from efficient_vdit_core.parallel.pool.session import Session
from efficient_vdit_core.parallel.pool.start_workers import Workers

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def others():
    """A pool that `evdit workers` runs."""
    workers = Workers(["cpu", "cpu"], "gloo", HOST, address_file=default_pool_file())
    workers.wait(START)
    yield workers
    workers.stop()


class Cancelled(Exception):
    pass


def cancel_after(seconds):
    begin = time.monotonic()

    def poll():
        if time.monotonic() > begin + seconds:
            raise Cancelled

    return poll


def pids(workers):
    return [process.pid for process in workers.processes]


def cancelled_step(session, seconds, chosen=None, poll=None, x=X):
    """A step that takes so long, cancelled soon."""
    message = {"trouble": "sleep", "rank": 1, "seconds": seconds}
    with pytest.raises(Cancelled):
        session.step(chosen or launch(), message, {"x": x}, poll or cancel_after(0.2))


def computes(session, chosen=None):
    return torch.equal(session.step(chosen or launch(), {}, {"x": X})[1]["sum"], 2 * X)


@pytest.mark.parametrize("size", [4, 2**23])
def test_to_free_the_devices_waits_for_no_cancelled_step(session, size):
    """Nobody could cancel that; nor does a large result that nobody takes keep them from it."""

    def cancel():
        if "was asked for sleep" in session.workers.last_lines(1):
            raise Cancelled

    before = pids(session.workers)
    cancelled_step(session, 4.0, poll=cancel, x=torch.zeros(size))
    begin = time.monotonic()
    assert session.offload(timeout=0.5) is False and time.monotonic() - begin < 2.0
    for rank in range(2):
        until(lambda rank=rank: "offloaded" in session.workers.last_lines(rank), seconds=30.0)
    assert computes(session) and session.offload() is True and pids(session.workers) == before


def test_a_step_that_fits_its_time_fits_it_behind_a_cancelled_one(session):
    chosen = launch(step_timeout=4.0)
    cancelled_step(session, 2.5, chosen)
    message = {"trouble": "sleep", "rank": 1, "seconds": 2.5}
    assert torch.equal(session.step(chosen, message, {"x": X})[1]["sum"], 2 * X)


def test_a_model_is_built_in_its_time_behind_a_cancelled_step(session):
    before = pids(session.workers)
    cancelled_step(session, 3.0)
    assert computes(session, launch(key="other", start_timeout=1.5)) and pids(session.workers) == before


@pytest.mark.parametrize("pressed", ["before", "amid"])
def test_cancel_keeps_the_workers_whose_inputs_are_larger_than_what_a_socket_holds(session, pressed):
    """Their models would have to be loaded again."""
    before, said = pids(session.workers), []

    def cancel():
        if pressed == "before" or (session.pool.connection.torn and not said):
            said.append(True)
            raise Cancelled

    with pytest.raises(Cancelled):
        session.step(launch(), {}, {"x": torch.zeros(12 * 2**20)}, cancel)
    assert said and computes(session) and pids(session.workers) == before


def test_cancel_does_not_wait_for_a_worker_that_stands_still_amid_a_message(session, monkeypatch):
    monkeypatch.setattr(request, "MESSAGE_SECONDS", 0.5)
    before, said = pids(session.workers), []

    def cancel():
        if session.pool.connection.torn and not said:
            said.append(time.monotonic())
            raise Cancelled

    os.kill(before[0], signal.SIGSTOP)
    with pytest.raises(Cancelled):
        session.step(launch(), {}, {"x": torch.zeros(12 * 2**20)}, cancel)
    assert 0.5 <= time.monotonic() - said[0] < 2.0
    assert computes(session) and gone(before)


def test_the_wait_for_a_cancelled_step_is_cancelled_as_well(session):
    """What would have come behind it is not begun: it was not sent."""
    before, begin = pids(session.workers), time.monotonic()
    cancelled_step(session, 3.0)
    for _ in range(2):
        cancelled_step(session, 60.0)
    assert time.monotonic() - begin < 2.5
    assert computes(session) and pids(session.workers) == before and time.monotonic() - begin < 30.0


def test_a_cancelled_step_that_hangs_is_told_of_on_its_own_time(session):
    before, begin = pids(session.workers), time.monotonic()
    cancelled_step(session, 600.0, launch(step_timeout=1.0))
    with pytest.raises(PoolFault, match="finish what was asked of them before in 1 s: all ranks.* Raise step_timeout"):
        computes(session)
    assert time.monotonic() - begin < 10.0 and gone(before)
    assert computes(session)


def test_the_next_comfyui_waits_for_what_the_one_before_has_cancelled(others, monkeypatch):
    monkeypatch.setattr(session_module, "SELF_TEST_SECONDS", 2.0)
    first, second = Session(), Session()
    assert computes(first)
    cancelled_step(first, 4.0)
    first.stop()
    with pytest.raises(Cancelled):
        second.ready(launch(), cancel_after(0.3))
    assert computes(second) and second.workers is None and not others.ended()
    second.stop()


def test_a_pool_that_stays_busy_for_another_is_left_to_it(others):
    first, second = Session(), Session()
    assert computes(first)
    cancelled_step(first, 6.0)
    first.stop()
    with pytest.raises(
        PoolFault, match="(?s)finish what was asked of them before in 0 s.*were left running: wait until"
    ):
        second.ready(launch(start_timeout=0.3, step_timeout=0.3))
    assert computes(second) and second.workers is None and not others.ended()
    second.stop()


def test_a_pool_that_others_started_is_not_promised_anew(others):
    session = Session()
    session.ready(launch())
    os.kill(pids(others)[1], signal.SIGKILL)
    with pytest.raises(
        PoolFault, match="(?s)rank 1 ended.*`evdit workers` starts them anew by itself; under torchrun"
    ) as caught:
        computes(session)
    assert "with the next run" not in str(caught.value)


def test_a_pool_that_others_started_is_not_ended_by_a_self_test(others, monkeypatch):
    monkeypatch.setattr(session_module, "SELF_TEST_SECONDS", 2.0)
    os.kill(pids(others)[1], signal.SIGSTOP)
    with pytest.raises(PoolFault, match="(?s)rank 1 does not answer.*were left running: wait until"):
        Session().ready(launch())
    os.kill(pids(others)[1], signal.SIGCONT)
    session = Session()
    assert computes(session) and session.workers is None and not others.ended()
    session.stop()
