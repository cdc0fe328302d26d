"""Rank 0's switchboard, with ranks that answer what the test says, when it says so."""

import threading

import pytest
from pools import HOST, hub_of, until

from efficient_vdit_core.parallel.pool.client import Pool, PoolFault
from efficient_vdit_core.parallel.pool.handshake import connect
from efficient_vdit_core.parallel.pool.messages import ConnectionEnded, listen
from efficient_vdit_core.parallel.pool.pool_file import PoolAddress
from efficient_vdit_core.parallel.pool.secret import new_secret

BROKEN = {"error": "KeyError: 'a layer'", "mistake": False, "traceback": "KeyError"}


class Ranks:
    """A pool of two ranks in this process; ``says[rank]`` is asked for each answer, and may wait."""

    def __init__(self):
        listener, secret = listen("127.0.0.1"), new_secret()
        self.says = [lambda message: {}, lambda message: {}]
        self.address = PoolAddress(*listener.getsockname(), secret, 2)
        self.hub = hub_of(listener, secret, 2, self._here)
        self.other = connect(*listener.getsockname(), secret)
        self.other.send({"role": "rank", "rank": 1, "version": "any"})
        self.other.receive()
        threading.Thread(target=self._there, daemon=True).start()

    def _here(self, message, _):
        threading.Thread(target=lambda: self.hub.answer(0, self.says[0](message)), daemon=True).start()

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
