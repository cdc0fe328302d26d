"""Rank 0's switchboard: passes ComfyUI's requests to all ranks, gathers their answers, and notices at once when a rank
is gone.

Its threads stay awake while the rank's main thread computes, so that a rank that hangs or dies is named, not waited
for.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .acceptor import Acceptor
from .code_version import CODE_VERSION
from .messages import Connection, ConnectionEnded, Tensors
from .pending_request import POOLS_OWN

Message = dict[str, Any]

# How long other ranks' words are awaited after the first fault: one that lost its peer may speak before the loss is
# seen.
GATHER_FAULTS_SECONDS = 0.5
# And after a mistake, which usually all ranks find; before it each may have loaded a model.
GATHER_MISTAKES_SECONDS = 5.0
# And by a rank that is asked to end: what has ended another one asks for this one's end too.
ASKED_SECONDS = 0.2
WHERE_SECONDS = 0.8
# How long the next ComfyUI is kept waiting for the end of the one before to be noticed.
LEAVE_SECONDS = 1.0
FATAL_EXIT = 3
# Requests in which ranks wait for one another: where one fails, the others would wait for ever, unless all fail alike.
TOGETHER = ("self-test", "step")


class Hub:
    """``run_here`` hands a request to this rank's own main thread; ``where`` tells what that thread is doing; ``host``
    names what builds the models here.

    ``about_pool`` is told to each rank that comes in; ``clean_up`` is called before this process ends.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: str,
        ranks: int,
        run_here: Callable[[Message, Tensors], None],
        where: Callable[[], str],
        *,
        host: str,
        about_pool: Message,
        clean_up: Callable[[], None],
    ) -> None:
        self.ranks, self.run_here, self.where = ranks, run_here, where
        self.host, self.about_pool, self.clean_up = host, about_pool, clean_up
        self.lock = threading.Condition()
        self.peers: dict[int, Connection] = {}
        self.versions: dict[int, str] = {}
        self.main: Connection | None = None
        self.request: Message = {}
        self.answers: dict[int, Message] = {}
        self.tensors: Tensors = {}
        self.places: dict[int, str] = {}
        self.faults: list[tuple[int, Message]] = []
        self.give_up_at = math.inf
        self.backlog: deque[tuple[Message, Tensors]] = deque()
        for work in (self._pass_on, self._give_up):
            threading.Thread(target=work, daemon=True).start()
        self.acceptor = Acceptor(listener, secret, self._enter)

    def wait_for_ranks(self, seconds: float) -> None:
        """Returns once every other rank is connected. Raises TimeoutError naming the ones that are not, RuntimeError
        for other versions."""
        with self.lock:
            if not self.lock.wait_for(lambda: len(self.peers) == self.ranks - 1, seconds):
                missing = sorted(set(range(1, self.ranks)) - set(self.peers))
                raise TimeoutError(f"Ranks {missing} did not reach rank 0 in {seconds:.0f} s. Look at their logs.")
            other = {rank: version for rank, version in self.versions.items() if version != CODE_VERSION}
        if other:
            found = ", ".join(f"rank {rank} is {version}" for rank, version in sorted(other.items()))
            raise RuntimeError(
                f"Rank 0 is version {CODE_VERSION} of Efficient-vDiT, {found}. Install the same on every machine."
            )

    def answer(self, rank: int, message: Message, tensors: Tensors | None = None) -> None:
        """Rank ``rank``'s answer to the request; the last one sends them all to ComfyUI, with rank 0's tensors."""
        with self.lock:
            if rank == 0:
                self.tensors = tensors or {}
            self.answers[rank] = message
            if "error" in message and self.request.get("do") in TOGETHER:
                self._fault(rank, message)
            if len(self.answers) == self.ranks:
                self._conclude()

    def _conclude(self) -> None:
        """All ranks have answered."""
        if self._one_mistake():
            self.faults, self.give_up_at = [], math.inf
        if self.faults:  # nobody else is awaited; an answer now would have the next request bear the blame
            self.give_up_at = 0.0
        else:
            every = [self.answers[r] for r in range(self.ranks)]
            # Who has asked for more no longer waits for this: a large result would fill the connection until the next run.
            awaited = all(message["id"] == POOLS_OWN for message, _ in self.backlog)
            self._tell_main({"id": self.request["id"], "ranks": every}, self.tensors if awaited else {})
            self.request = {}
        self.lock.notify_all()

    def _one_mistake(self) -> bool:
        """Whether all ranks have stopped over the same mistake of the user: at the same place, so that none waits for
        another and nothing is on its way between them."""
        mistakes = [message["error"] for _, message in self.faults if message.get("mistake")]
        return len(mistakes) == len(self.faults) == self.ranks and len(set(mistakes)) == 1

    def _fault(self, rank: int, message: Message) -> None:
        seconds = GATHER_MISTAKES_SECONDS if message.get("mistake") else GATHER_FAULTS_SECONDS
        self.faults.append((rank, message))
        self.give_up_at = min(self.give_up_at, time.monotonic() + seconds)
        self.lock.notify_all()

    def _give_up(self) -> None:
        """Ranks that wait for a lost one would wait for ever: when it is time, say who failed, and end them all."""
        with self.lock:
            while (left := self.give_up_at - time.monotonic()) > 0.0:
                self.lock.wait(min(left, threading.TIMEOUT_MAX))
            self._tell_faults()
        self.end(FATAL_EXIT)

    def _tell_faults(self) -> None:
        # Where a rank was lost, what the others say is only that they miss it.
        faults = [fault for fault in self.faults if fault[1].get("lost")] or self.faults
        self._tell_main(
            {"id": self.request.get("id"), "fatal": True, "faults": [{**m, "rank": r} for r, m in faults]}, {}
        )

    def end_when_asked(self) -> None:
        """End all ranks. Where another one has failed, torchrun asks for that before it is seen here, and ComfyUI must hear
        of the one that failed."""
        with self.lock:
            if self.request:
                self.lock.wait_for(lambda: self.faults, ASKED_SECONDS)
            if self.faults:
                self._tell_faults()
        self.end(0)

    def end(self, status: int) -> None:
        """End this rank, and with it every other: they end when their connection here does."""
        try:
            self.clean_up()
        finally:
            os._exit(status)

    def _tell_main(self, message: Message, tensors: Tensors) -> None:
        if self.main is not None:
            try:
                self.main.send(message, tensors)
            except ConnectionEnded:
                self.main = None

    def _enter(self, hello: Message, connection: Connection) -> None:
        """Serve one that has proved the secret until it goes."""
        if hello.get("role") == "rank":
            self._serve_rank(int(hello["rank"]), str(hello.get("version")), connection)
        elif self._welcome(hello, connection):
            self._serve_main(connection)

    def _serve_rank(self, rank: int, version: str, connection: Connection) -> None:
        with self.lock:
            if rank in self.peers or not 0 < rank < self.ranks:
                raise ValueError(f"rank {rank} has come in already, or is none of {self.ranks}")
            self.peers[rank], self.versions[rank] = connection, version
            self.lock.notify_all()
        connection.send({"welcome": True, **self.about_pool})
        try:
            while True:
                message, tensors = connection.receive()
                if "where" in message:
                    with self.lock:
                        self.places[rank] = message["where"]
                        self.lock.notify_all()
                else:
                    self.answer(rank, message, tensors)
        except ConnectionEnded:
            with self.lock:
                self._fault(rank, {"error": "ended without a word", "lost": True})

    def _welcome(self, hello: Message, connection: Connection) -> bool:
        """Whether this ComfyUI may use the pool; it is told why not, or whether the ranks still work for another."""
        refusal = ""
        if hello.get("host") != self.host:
            refusal = f"its workers run {self.host}, expected {hello.get('host')}: end them first"
        if hello.get("version") != CODE_VERSION:
            refusal = f"the workers are version {CODE_VERSION} of Efficient-vDiT, ComfyUI has {hello.get('version')}: start them anew"
        with self.lock:
            if not self.lock.wait_for(lambda: self.main is None, LEAVE_SECONDS):
                refusal = "another ComfyUI uses these workers: end it, or run it with after_run set to stop"
            if refusal:
                connection.send({"refused": refusal})
            else:
                connection.send({"welcome": True, "busy": bool(self.request or self.backlog)})
                self.main = connection
        return not refusal

    def _serve_main(self, connection: Connection) -> None:
        try:
            while True:
                message, tensors = connection.receive()
                if message["do"] == "exit":  # as a fault: torchrun ends a rank that hangs only where another one fails
                    self.end(FATAL_EXIT)
                elif message["do"] == "where":
                    connection.send({"id": message["id"], "where": self._ask_where()})
                else:
                    self._put(message, tensors)
        finally:
            with self.lock:
                if self.main is connection:
                    self.main = None
                self._put({"do": "offload", "id": POOLS_OWN}, {})  # nobody else would free the devices

    def _put(self, message: Message, tensors: Tensors) -> None:
        with self.lock:
            self.backlog.append((message, tensors))
            self.lock.notify_all()

    def _pass_on(self) -> None:
        """Hands ComfyUI's requests to all ranks, one after another."""
        while True:
            with self.lock:
                # A cancelled step is still being computed; its answers must not mix with the next one's.
                self.lock.wait_for(lambda: self.backlog and not self.request)
                message, tensors = self.backlog.popleft()
                self.request, self.answers, self.tensors = message, {}, {}
            for rank, peer in self.peers.items():
                try:
                    peer.send(message, tensors)
                except ConnectionEnded:
                    with self.lock:
                        self._fault(rank, {"error": "ended without a word", "lost": True})
            self.run_here(message, tensors)

    def _ask_where(self) -> dict[str, str]:
        """What each rank's main thread is doing; a rank that does not answer is left out."""
        with self.lock:
            self.places = {0: self.where()}
        for peer in self.peers.values():
            # In threads: what a hanging rank was sent before may fill its connection.
            threading.Thread(target=_try_to_send, args=(peer, {"do": "where"}), daemon=True).start()
        with self.lock:
            self.lock.wait_for(lambda: len(self.places) == self.ranks, WHERE_SECONDS)
            return {str(rank): place for rank, place in self.places.items()}


def _try_to_send(peer: Connection, message: Message) -> None:
    try:
        peer.send(message)
    except ConnectionEnded:
        pass  # the thread that receives from it says so
