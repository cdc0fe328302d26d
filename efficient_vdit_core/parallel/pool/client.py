"""ComfyUI's end of a pool: asks the workers, waits without deafness to Cancel, and says what went wrong in which
rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ... import __version__
from .handshake import HANDSHAKE_SECONDS, connect
from .messages import ConnectionEnded, Late, Tensors, Tick, ticks
from .pool_file import PoolAddress

Message = dict[str, Any]
Poll = Callable[[], None]
Answers = tuple[list[Message], Tensors]

_POLL_SECONDS = 0.1
# How long a lost pool may take to say who failed, and a hanging one to say where its ranks are.
_LAST_WORDS_SECONDS, _WHERE_SECONDS = 1.0, 1.2
# The node's input that says how long a request may take.
_SETTINGS = {"open": "start_timeout", "step": "step_timeout"}


class PoolFault(RuntimeError):
    """The pool is gone, or had to be given up; a new one must be started. ``lost``: the ranks that ended without a
    word."""

    def __init__(self, text: str, lost: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.lost = lost


class Pool:
    """A connection to a running pool whose workers build models with the class named ``host``.

    ``poll`` is called while it waits for the pool, and may raise, to cancel. Raises ConnectionError where none answers
    at ``address``, PoolFault where it refuses.
    """

    def __init__(self, address: PoolAddress, host: str, poll: Poll | None = None) -> None:
        self.address, self.usable = address, True
        self.ids = itertools.count(1)
        self.connection = connect(address.host, address.port, address.secret, poll=poll)
        try:
            self._introduce(host, ticks(HANDSHAKE_SECONDS, poll))
        except BaseException:
            self.close()
            raise

    def _introduce(self, host: str, tick: Tick) -> None:
        self.connection.sock.settimeout(_POLL_SECONDS)
        try:
            self.connection.send({"role": "main", "version": __version__, "host": host}, tick=tick)
            answer, _ = self.connection.receive(tick)
        except Late:
            raise ConnectionEnded("the pool of workers does not answer") from None
        if "refused" in answer:
            raise PoolFault(f"The pool of workers cannot be used: {answer['refused']}.")

    @property
    def ranks(self) -> int:
        return self.address.ranks

    def ask(
        self, message: Message, tensors: Tensors | None = None, *, timeout: float, poll: Poll | None = None
    ) -> Answers:
        """Every rank's answer, and rank 0's tensors.

        ``poll`` is called ten times a second and may raise, to cancel: the ranks finish that request unheard. Raises
        ValueError for a user's mistake that a rank found, RuntimeError for its other errors, PoolFault where the pool
        is lost, each with the rank's own words.
        """
        number = next(self.ids)
        try:
            tick = ticks(timeout, poll)
            answer = self._fault_unread()
            result: Tensors = {}
            if answer is None:
                self.connection.send({**message, "id": number}, tensors, tick)
                answer, result = self._await(number, tick)
        except Late:
            raise self._hangs(timeout, _SETTINGS.get(message["do"])) from None
        except ConnectionEnded:
            answer, result = self._last_words(), {}
        finally:
            if self.connection.torn:
                self.close()
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

    def _fault_unread(self) -> Message | None:
        """What the pool has said since the last request, if it is a fault: it may have lost a rank while it was idle."""
        while self.connection.unread():
            answer, _ = self.connection.receive(ticks(_LAST_WORDS_SECONDS))
            if answer.get("fatal"):
                return answer
        return None

    def _last_words(self) -> Message:
        """The fault that a pool has told of before its connection ended; it may lie here unread."""
        nothing: Message = {"fatal": True, "faults": []}
        try:
            return self._fault_unread() or nothing
        except (Late, ConnectionEnded, ValueError):
            return nothing

    def _await(self, number: int, tick: Tick) -> tuple[Message, Tensors]:
        while True:
            answer, tensors = self.connection.receive(tick)
            if answer.get("id") == number or answer.get("fatal"):
                return answer, tensors
            # else the answer to something that was cancelled

    def _hangs(self, timeout: float, setting: str | None) -> PoolFault:
        """After a timeout: which rank does not answer, or what all of them are doing."""
        places = self._places()
        silent = [rank for rank in range(self.ranks) if str(rank) not in places]
        who = f"rank {silent[0]} does not answer" if silent else "all ranks answer but none has finished"
        advice = f" Raise {setting} if it takes that long." if setting else ""
        stacks = "".join(f"\nrank {rank} is at\n{place}" for rank, place in sorted(places.items()))
        self.end()
        return PoolFault(f"The workers did not finish in {timeout:.0f} s: {who}.{advice}{stacks}")

    def _places(self) -> dict[str, str]:
        """Where each rank that answers is. Rank 0 passes the question on: without it there are none."""
        if self.connection.torn:
            return {}
        try:
            tick = ticks(_WHERE_SECONDS)
            self.connection.send({"do": "where", "id": -1}, tick=tick)
            while True:
                answer, _ = self.connection.receive(tick)
                if "where" in answer:
                    return answer["where"]
        except (Late, ConnectionEnded):
            return {}

    def _lost(self, faults: list[Message]) -> PoolFault:
        self.usable = False
        self.connection.close()
        lost = tuple(f["rank"] for f in faults if f.get("lost")) if faults else (0,)
        return PoolFault("\n".join(_words(faults)) or "rank 0 ended without a word", lost)

    def close(self) -> None:
        """Leave the pool running for others."""
        self.usable = False
        self.connection.close()

    def end(self) -> None:
        """End the workers."""
        try:
            if not self.connection.torn:
                self.connection.send({"do": "exit"})
        except ConnectionEnded:
            pass
        self.close()


def _words(faults: list[Message]) -> list[str]:
    """What the ranks said, each sentence once. A mistake needs no traceback: its sentence says what to do."""
    said: dict[str, set[int]] = {}
    for fault in faults:
        detail = "" if fault.get("mistake") or "traceback" not in fault else f"\n{fault['traceback']}"
        said.setdefault(f"{fault['error']}{detail}", set()).add(fault["rank"])
    return [f"rank{'s' * (len(who) > 1)} {', '.join(map(str, sorted(who)))}: {text}" for text, who in said.items()]
