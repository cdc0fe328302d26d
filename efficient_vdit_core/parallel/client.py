"""ComfyUI's end of a pool: asks the workers, waits without deafness to Cancel, and says what went wrong in which rank."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Callable
from typing import Any

from .. import __version__
from .messages import ConnectionEnded, Tensors, connect
from .pool_file import PoolAddress

Message = dict[str, Any]
Poll = Callable[[], None]
Answers = tuple[list[Message], Tensors]

_POLL_SECONDS = 0.1
_WHERE_SECONDS = 6.0


class PoolFault(RuntimeError):
    """The pool is gone, or had to be given up; a new one must be started. ``lost``: the ranks that ended without a word."""

    def __init__(self, text: str, lost: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.lost = lost


class Pool:
    """A connection to a running pool. Raises ConnectionError where none listens at ``address``, PoolFault where it refuses."""

    def __init__(self, address: PoolAddress) -> None:
        self.address, self.usable = address, True
        self.ids = itertools.count(1)
        self.connection = connect(address.host, address.port, address.secret)
        self.connection.send({"role": "main", "version": __version__})
        answer, _ = self.connection.receive()
        if "refused" in answer:
            self.connection.close()
            raise PoolFault(f"The pool of workers cannot be used: {answer['refused']}.")

    @property
    def ranks(self) -> int:
        return self.address.ranks

    def ask(self, message: Message, tensors: Tensors | None = None, *, timeout: float, poll: Poll | None = None) -> Answers:
        """Every rank's answer, and rank 0's tensors.

        ``poll`` is called ten times a second and may raise, to cancel: the ranks finish that request unheard. Raises
        ValueError for a user's mistake that a rank found, RuntimeError for its other errors, PoolFault where the pool is
        lost, each with the rank's own words.
        """
        number = next(self.ids)
        try:
            self.connection.send({**message, "id": number}, tensors)
            setting = "step_timeout" if message["do"] == "step" else "start_timeout"
            answer, result = self._await(number, timeout, setting, poll)
        except ConnectionEnded:
            raise self._lost([]) from None
        if answer.get("fatal"):
            raise self._lost(answer["faults"])
        ranks: list[Message] = answer["ranks"]
        failed = [(rank, said) for rank, said in enumerate(ranks) if "error" in said]
        if failed:
            rank, said = failed[0]
            kind = ValueError if said["mistake"] else RuntimeError
            detail = "" if said["mistake"] else f"\n{said['traceback']}"
            raise kind(f"{said['error']} (rank {rank} of {self.ranks}){detail}")
        return ranks, result

    def _await(self, number: int, timeout: float, setting: str, poll: Poll | None) -> tuple[Message, Tensors]:
        end = time.monotonic() + timeout
        while True:
            if select.select([self.connection.sock], [], [], _POLL_SECONDS)[0]:
                answer, tensors = self.connection.receive()
                if answer.get("id") == number or answer.get("fatal"):
                    return answer, tensors
                continue  # the answer to something that was cancelled
            if poll is not None:
                poll()
            if time.monotonic() > end:
                raise self._hangs(timeout, setting)

    def _hangs(self, timeout: float, setting: str) -> PoolFault:
        """After a timeout: which rank does not answer, or what all of them are doing."""
        self.usable = False
        self.connection.send({"do": "where", "id": -1})
        places: dict[str, str] = {}
        end = time.monotonic() + _WHERE_SECONDS
        while time.monotonic() < end:
            if select.select([self.connection.sock], [], [], _POLL_SECONDS)[0]:
                answer, _ = self.connection.receive()
                if "where" in answer:
                    places = answer["where"]
                    break
        silent = [rank for rank in range(self.ranks) if str(rank) not in places]
        who = f"rank {silent[0]} does not answer" if silent else "all ranks answer but none has finished"
        stacks = "\n".join(f"rank {rank} is at\n{place}" for rank, place in sorted(places.items()))
        self.end()
        return PoolFault(f"The workers did not finish in {timeout:.0f} s: {who}. Raise {setting} if it takes that long.\n{stacks}")

    def _lost(self, faults: list[Message]) -> PoolFault:
        self.usable = False
        self.connection.close()
        words = [f"rank {f['rank']}: {f['error']}" + (f"\n{f['traceback']}" if "traceback" in f else "") for f in faults]
        lost = tuple(f["rank"] for f in faults if f.get("lost")) if faults else (0,)
        return PoolFault("\n".join(words) or "rank 0 ended without a word", lost)

    def close(self) -> None:
        """Leave the pool running for others."""
        self.usable = False
        self.connection.close()

    def end(self) -> None:
        """End the workers."""
        self.usable = False
        try:
            self.connection.send({"do": "exit"})
        except ConnectionEnded:
            pass
        self.connection.close()
