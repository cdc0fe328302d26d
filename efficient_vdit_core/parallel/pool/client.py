"""ComfyUI's end of a pool: asks the workers, and waits without deafness to Cancel or to what went wrong in which rank."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from .code_version import CODE_VERSION
from .faults import Fatal, PoolFault, fault_of_hanging, fault_of_lost
from .handshake import HANDSHAKE_SECONDS, connect
from .messages import ConnectionEnded, Late, Tensors, Tick, ticks
from .pending_request import POOLS_OWN, Cancel, Request
from .pool_file import PoolAddress

Message = dict[str, Any]
Poll = Callable[[], None]
Answers = tuple[list[Message], Tensors]

_POLL_SECONDS = 0.1
# How long a lost pool may take to say who failed, and a hanging one to say where its ranks are.
_LAST_WORDS_SECONDS, _WHERE_SECONDS = 1.0, 1.2
# The node's input that says how long a request may take.
_SETTINGS = {"open": "start_timeout", "step": "step_timeout"}


class Pool:
    """A connection to a running pool whose workers build models with the class named ``host``.

    ``poll`` is called while it waits for the pool, and may raise, to cancel. Where the pool still works for a ComfyUI that
    has left, the first request waits for that first, ``patience`` seconds at most. Raises ConnectionError where none
    answers at ``address``, PoolFault where it refuses.
    """

    def __init__(self, address: PoolAddress, host: str, poll: Poll | None = None, *, patience: float = 600.0) -> None:
        self.address, self.usable = address, True
        self.ids = itertools.count(POOLS_OWN + 1)
        # What the pool has not answered yet. It answers in this order, and also what was cancelled.
        self.owed: list[Request] = []
        self.connection = connect(address.host, address.port, address.secret, poll=poll)
        try:
            welcome = self._introduce(host, ticks(HANDSHAKE_SECONDS, poll))
        except BaseException:
            self.close()
            raise
        if welcome["busy"]:
            self.owed.append(Request(POOLS_OWN, patience, _SETTINGS["step"], ours=False))

    def _introduce(self, host: str, tick: Tick) -> Message:
        self.connection.sock.settimeout(_POLL_SECONDS)
        try:
            self.connection.send({"role": "main", "version": CODE_VERSION, "host": host}, tick=tick)
            answer, _ = self.connection.receive(tick)
        except Late:
            raise ConnectionEnded("the pool of workers does not answer") from None
        if "refused" in answer:
            raise PoolFault(f"The pool of workers cannot be used: {answer['refused']}.")
        return answer

    @property
    def ranks(self) -> int:
        return self.address.ranks

    def ask(
        self,
        message: Message,
        tensors: Tensors | None = None,
        *,
        timeout: float,
        poll: Poll | None = None,
        wait: bool = True,
    ) -> Answers:
        """Every rank's answer, and rank 0's tensors.

        ``poll`` is called ten times a second and may raise, to cancel, which waits for the end of a message that is on its
        way: the ranks finish that request unheard, and the next one waits for them, on the time of the cancelled one.
        Without ``wait`` it is only sent where it would have to wait so, and the answers are none. Raises ValueError for a
        user's mistake that a rank found, RuntimeError for its other errors, PoolFault where the pool is lost, each with the
        rank's own words.
        """
        do = message["do"]
        request = Request(next(self.ids), timeout, _SETTINGS.get(do, ""), ours=do != "self-test")
        message, cancel = {**message, "id": request.number}, Cancel(poll, self.connection)
        with self._faults_raised(request):
            self._read_what_lies_here(ticks(timeout, cancel))
            if self.owed and not wait:
                return self._send_unheard(message, request)
            self._settle(cancel)
            self.connection.send(message, tensors, request.tick(cancel))
            self.owed.append(request)
            answer, result = self._settle(cancel)
        return self._judged(answer["ranks"]), result

    def gone(self) -> str:
        """Why the pool has ended since the last request, "" where it lives or still works for a cancelled one."""
        try:
            if not self.owed:
                with self._faults_raised(Request(0, _LAST_WORDS_SECONDS)):
                    self._read_what_lies_here(ticks(_LAST_WORDS_SECONDS))
        except PoolFault as fault:
            return str(fault)
        return ""

    def _judged(self, ranks: list[Message]) -> list[Message]:
        """The ranks' answers. Raises what the first of them reports that failed."""
        failed = [(rank, said) for rank, said in enumerate(ranks) if "error" in said]
        if failed:
            rank, said = failed[0]
            kind = ValueError if said["mistake"] else RuntimeError
            detail = "" if said["mistake"] else f"\n{said['traceback']}"
            raise kind(f"{said['error']} (rank {rank} of {self.ranks}){detail}")
        return ranks

    @contextlib.contextmanager
    def _faults_raised(self, request: Request) -> Iterator[None]:
        """Raises PoolFault where what is done within, for ``request``, takes too long or the pool is lost."""
        try:
            yield
        except Late:
            raise self._hangs(self.owed[0] if self.owed else request, request) from None
        except Fatal as fatal:
            raise self._lost(fatal.faults) from None
        except ConnectionEnded:
            raise self._lost(self._last_words()) from None
        finally:
            if self.connection.torn:
                self.close()

    def _settle(self, cancel: Cancel) -> tuple[Message, Tensors]:
        """Wait for all that the pool owes, each on its own time; the last answer. Between messages Cancel is heard."""
        answer, tensors = {}, {}
        cancel()
        while self.owed:
            answer, tensors = self._receive(self.owed[0].tick(cancel))
            cancel()
        return answer, tensors

    def _receive(self, tick: Tick) -> tuple[Message, Tensors]:
        answer, tensors = self.connection.receive(tick)
        if answer.get("fatal"):
            raise Fatal(answer["faults"])
        if self.owed and answer.get("id") == self.owed[0].number:
            del self.owed[0]
        return answer, tensors

    def _send_unheard(self, message: Message, request: Request) -> Answers:
        """Send what nobody waits for. A rank 0 that does not even take this hangs, which leaves the connection torn."""
        with contextlib.suppress(Late):
            self.connection.send(message, tick=ticks(_LAST_WORDS_SECONDS))
            self.owed.append(request)
        return [], {}

    def _read_what_lies_here(self, tick: Tick) -> None:
        """What the pool has said since the last request: it may have lost a rank while it was idle."""
        while self.connection.unread():
            self._receive(tick)

    def _last_words(self) -> list[Message]:
        """The faults that a pool has told of before its connection ended; they may lie here unread."""
        try:
            self._read_what_lies_here(ticks(_LAST_WORDS_SECONDS))
        except Fatal as fatal:
            return fatal.faults
        except (Late, ConnectionEnded, ValueError):
            pass
        return []

    def _hangs(self, late: Request, request: Request) -> PoolFault:
        """After a timeout of ``late``: ends the pool, or leaves it where it hangs over the work of another ComfyUI."""
        fault = fault_of_hanging(late, request, self._places(), self.ranks)
        if late.ours:
            self.end()
        else:
            self.close()
        return fault

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
        self.close()
        return fault_of_lost(faults)

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
