"""Who may come in: accepts connections and has each prove the secret.

Those that do not are few and short: a stranger cannot use up this process's files or threads, and where these are used
up by something else, it accepts again once there are some. Not multiprocessing's Listener, which one silent stranger
shuts, nor socketserver, which spins where no file is left (tests/core/test_library_faults.py).
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from .handshake import admit
from .messages import Connection, ConnectionEnded, Late, hang_up, ticks

# Connections that have not proved the secret yet; one more, and the oldest of them goes.
MOST_UNPROVED = 16
PROVE_SECONDS = 5.0
_NEXT_TRY_SECONDS = 0.05


class Acceptor:
    """``enter`` is called with the first message of each connection that has proved the secret, in a thread of its
    own."""

    def __init__(
        self, listener: socket.socket, secret: str, enter: Callable[[dict[str, Any], Connection], None]
    ) -> None:
        self.listener, self.secret, self.enter = listener, secret, enter
        self.lock = threading.Lock()
        self.unproved: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self.listener.fileno() >= 0:
            try:
                sock, _ = self.listener.accept()
            except OSError:  # out of files or memory, or the caller was gone before it was let in
                self._send_away((len(self.unproved) + 1) // 2)
                time.sleep(_NEXT_TRY_SECONDS)
                continue
            with self.lock:
                self.unproved.append(sock)
            self._send_away(len(self.unproved) - MOST_UNPROVED)
            try:
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()
            except RuntimeError:  # out of threads
                self._forget(sock)
                sock.close()

    def _send_away(self, count: int) -> None:
        with self.lock:
            oldest = self.unproved[: max(0, count)]
        for sock in oldest:
            hang_up(sock)  # its own thread closes it

    def _forget(self, sock: socket.socket) -> None:
        with self.lock:
            self.unproved.remove(sock)

    def _greet(self, sock: socket.socket) -> None:
        try:
            tick = ticks(PROVE_SECONDS)
            connection = admit(sock, self.secret, tick)
            connection.sock.settimeout(_NEXT_TRY_SECONDS)
            hello, _ = connection.receive(tick)
            connection.sock.settimeout(None)
        except (Late, OSError, ValueError, KeyError):
            sock.close()
            return
        finally:
            self._forget(sock)
        try:
            self.enter(hello, connection)
        except (ConnectionEnded, ValueError, KeyError):
            pass
        finally:
            connection.close()
