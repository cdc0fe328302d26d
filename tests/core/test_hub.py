"""Rank 0's switchboard, with ranks that answer what the test says, when it says so."""

import threading
import time

import pytest
import torch
from pools import HOST, hub_of, until

from efficient_vdit_core.parallel.pool import hub
from efficient_vdit_core.parallel.pool.client import Pool
from efficient_vdit_core.parallel.pool.faults import PoolFault
from efficient_vdit_core.parallel.pool.handshake import connect
from efficient_vdit_core.parallel.pool.messages import ConnectionEnded, listen
from efficient_vdit_core.parallel.pool.pool_file import PoolAddress
from efficient_vdit_core.parallel.pool.secret import new_secret

BROKEN = {"error": "KeyError: 'a layer'", "mistake": False, "traceback": "KeyError"}
MISTAKE = {"error": "Write a longer prompt.", "mistake": True, "traceback": "ValueError"}


class Ranks:
    """A pool of two ranks in this process; ``says[rank]`` is asked for each answer, and may wait."""

    def __init__(self):
        listener, secret = listen("127.0.0.1"), new_secret()
        self.says = [lambda message: {}, lambda message: {}]
        self.result = {}
        self.address = PoolAddress(*listener.getsockname(), secret, 2)
        self.hub = hub_of(listener, secret, 2, self._here)
        self.other = connect(*listener.getsockname(), secret)
        self.other.send({"role": "rank", "rank": 1, "version": "any"})
        self.other.receive()
        threading.Thread(target=self._there, daemon=True).start()

    def _here(self, message, _):
        threading.Thread(target=lambda: self.hub.answer(0, self.says[0](message), self.result), daemon=True).start()

    def _there(self):
        try:
            while True:
                message, _ = self.other.receive()
                self.other.send(self.says[1](message))
        except ConnectionEnded:
            pass


@pytest.fixture
def ranks():
    made = Ranks()
    yield made
    made.other.close()


def test_a_fault_is_told_once_where_the_other_rank_ends_after_it(ranks):
    """Not as an error of its own request first, and then as the end of the pool in the next one."""

    def end_later(message):
        until(lambda: ranks.hub.faults)
        return {}

    ranks.says = [lambda message: BROKEN, end_later]
    pool = Pool(ranks.address, HOST.name)
    with pytest.raises(PoolFault, match=r"^rank 0: KeyError: 'a layer'"):
        pool.ask({"do": "step"}, timeout=5.0)
    assert not pool.usable


def test_a_rank_that_is_asked_to_end_tells_which_one_ended_before(ranks, monkeypatch):
    """As torchrun asks the others where one has ended, sooner than rank 0 would have told it."""
    monkeypatch.setattr(hub, "GATHER_FAULTS_SECONDS", 60.0)
    over = threading.Event()
    ranks.says = [lambda message: over.wait() and {}] * 2

    def end():
        until(lambda: ranks.hub.request)
        ranks.other.close()
        ranks.hub.end_when_asked()

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(PoolFault, match="rank 1 ended without a word"):
        Pool(ranks.address, HOST.name).ask({"do": "step"}, timeout=5.0)
    over.set()


def test_a_mistake_of_one_rank_ends_the_pool_without_a_traceback(ranks, monkeypatch):
    """The others wait for it. It is their end that is told, but the sentence says what to do."""
    monkeypatch.setattr(hub, "GATHER_MISTAKES_SECONDS", 0.2)
    ended = threading.Event()
    ranks.says = [lambda message: MISTAKE, lambda message: ended.wait() and {}]
    with pytest.raises(PoolFault, match=r"^rank 0: Write a longer prompt\.$"):
        Pool(ranks.address, HOST.name).ask({"do": "step"}, timeout=5.0)
    ended.set()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({**MISTAKE, "error": "Name more devices."}, "rank 0: Write a longer prompt.\nrank 1: Name more devices."),
        (BROKEN, "rank 0: Write a longer prompt.\nrank 1: KeyError: 'a layer'\nKeyError"),
    ],
)
def test_ranks_that_fail_in_different_ways_end_the_pool_at_once(ranks, other, told):
    """They may have stopped at different places, with something on its way between them."""

    def say_later(message):
        until(lambda: ranks.hub.faults)
        return other

    ranks.says = [lambda message: MISTAKE, say_later]
    begin = time.monotonic()
    with pytest.raises(PoolFault) as caught:
        Pool(ranks.address, HOST.name).ask({"do": "step"}, timeout=20.0)
    assert str(caught.value) == told and time.monotonic() - begin < hub.GATHER_MISTAKES_SECONDS


def test_what_all_ranks_say_is_told_once(ranks):
    ranks.says = [lambda message: BROKEN] * 2
    with pytest.raises(PoolFault, match=r"^ranks 0, 1: KeyError: 'a layer'\nKeyError$"):
        Pool(ranks.address, HOST.name).ask({"do": "step"}, timeout=5.0)


def test_a_mistake_of_all_ranks_leaves_room_for_the_next_fault(ranks):
    pool = Pool(ranks.address, HOST.name)
    for _ in range(2):
        ranks.says = [lambda message: MISTAKE] * 2
        with pytest.raises(ValueError, match=r"^Write a longer prompt\. \(rank 0 of 2\)$"):
            pool.ask({"do": "step"}, timeout=5.0)
    ranks.says = [lambda message: BROKEN, lambda message: {}]
    with pytest.raises(PoolFault, match="^rank 0: KeyError"):
        pool.ask({"do": "step"}, timeout=5.0)


def test_the_end_of_one_comfyui_takes_no_result_from_the_next(ranks):
    """The pool then asks itself to offload, which the next one has not asked for."""
    first, go_on, answers = Pool(ranks.address, HOST.name), threading.Event(), []
    with ranks.hub.lock:
        ranks.hub.main = None  # as a failed answer leaves it
    second = Pool(ranks.address, HOST.name)
    ranks.says[0], ranks.result = lambda message: go_on.wait() and {}, {"out": torch.arange(4.0)}
    asking = threading.Thread(target=lambda: answers.append(second.ask({"do": "step"}, timeout=20.0)), daemon=True)
    asking.start()
    until(lambda: ranks.hub.request)
    first.close()
    until(lambda: ranks.hub.backlog)
    go_on.set()
    asking.join(20.0)
    assert torch.equal(answers[0][1]["out"], ranks.result["out"])


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("way", ["sent", "received"])
def test_cancel_waits_for_the_end_of_a_message(ranks, way):
    """One that is broken off cannot be taken up again, and the pool would be lost with its models. It is said once."""
    pool, said = Pool(ranks.address, HOST.name), []
    large = torch.zeros(2**24)

    def cancel():
        if pool.connection.torn and (way == "sent") != bool(pool.owed) and not said:
            said.append(True)
            raise Cancelled

    ranks.result = {"out": large} if way == "received" else {}
    with pytest.raises(Cancelled):
        pool.ask({"do": "step"}, {"x": large} if way == "sent" else {}, timeout=20.0, poll=cancel)
    assert said and pool.usable
    ranks.result = {"out": torch.arange(4.0)}
    assert torch.equal(pool.ask({"do": "step"}, timeout=20.0)[1]["out"], torch.arange(4.0))


def test_what_was_cancelled_already_is_not_sent(ranks):
    pool = Pool(ranks.address, HOST.name)
    with pytest.raises(Cancelled):
        pool.ask({"do": "step"}, timeout=20.0, poll=raise_cancelled)
    assert not pool.owed and pool.ask({"do": "step"}, timeout=20.0) == ([{}, {}], {})


def raise_cancelled():
    raise Cancelled


def test_a_result_that_nobody_waits_for_is_not_sent(ranks):
    """It would fill the connection, and what was asked behind it would not be heard of until somebody reads."""
    pool, go_on, done = Pool(ranks.address, HOST.name), threading.Event(), []

    def say(message):
        if message["do"] == "step":
            go_on.wait()
        else:
            done.append(message["do"])
        return {}

    def cancel():
        if ranks.hub.request:
            raise KeyboardInterrupt

    ranks.says[0], ranks.result = say, {"out": torch.zeros(2**23)}
    with pytest.raises(KeyboardInterrupt):
        pool.ask({"do": "step"}, timeout=20.0, poll=cancel)
    assert pool.ask({"do": "offload"}, timeout=20.0, wait=False) == ([], {}) and not done
    until(lambda: ranks.hub.backlog)
    go_on.set()
    until(lambda: done, seconds=20.0)
    ranks.result = {}
    assert pool.ask({"do": "self-test"}, timeout=20.0) == ([{}, {}], {})
