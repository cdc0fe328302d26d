"""How the two ends of a connection prove the same secret to each other, in a set time, before anything else is read.

Not multiprocessing's: a stranger can turn its question back on another client and pass for the pool, it takes MD5, and it
waits without end for one who stays silent (tests/core/test_library_faults.py). Here each proof names its side and holds
both nonces.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Callable

from .messages import Connection, ConnectionEnded, Late, Tick, read, ticks, write

NONCE, DIGEST = 32, 32
# For all of a handshake, not for each byte of it.
HANDSHAKE_SECONDS = 5.0
_SLICE_SECONDS = 0.1


class WrongSecret(ConnectionEnded):
    """The other end does not know the secret, or says that this one does not."""


def connect(
    host: str,
    port: int,
    secret: str,
    *,
    timeout: float = HANDSHAKE_SECONDS,
    poll: Callable[[], None] | None = None,
) -> Connection:
    """Open a connection, prove the secret and have it proved, all in ``timeout`` seconds; ``poll`` may raise, to cancel.

    Raises ConnectionError where nobody answers, WrongSecret where a stranger does.
    """
    sock = socket.create_connection((host, port), timeout=timeout)
    try:
        sock.settimeout(_SLICE_SECONDS)
        tick = ticks(timeout, poll)
        theirs, mine = bytes(read(sock, NONCE, tick)), secrets.token_bytes(NONCE)
        write(sock, mine + _proof(secret, b"client", theirs, mine), tick)
        try:
            proof = bytes(read(sock, DIGEST, tick))
        except ConnectionEnded:
            raise WrongSecret("what listens there does not accept the secret of the pool") from None
        if not hmac.compare_digest(proof, _proof(secret, b"server", theirs, mine)):
            raise WrongSecret("what listens there does not know the secret of the pool")
    except Late:
        sock.close()
        raise ConnectionEnded(f"what listens there has not proved the secret in {timeout:.0f} s") from None
    except BaseException:
        sock.close()
        raise
    return Connection(sock)


def admit(sock: socket.socket, secret: str, tick: Tick) -> Connection:
    """The connection that ``sock``, just accepted, becomes where its other end proves the secret before ``tick`` raises.

    Raises WrongSecret where it does not know it, ConnectionEnded where it leaves.
    """
    sock.settimeout(_SLICE_SECONDS)
    mine = secrets.token_bytes(NONCE)
    write(sock, mine, tick)
    answer = bytes(read(sock, NONCE + DIGEST, tick))
    theirs, proof = answer[:NONCE], answer[NONCE:]
    if not hmac.compare_digest(proof, _proof(secret, b"client", mine, theirs)):
        raise WrongSecret("what came in does not know the secret of the pool")
    write(sock, _proof(secret, b"server", mine, theirs), tick)
    return Connection(sock)


def _proof(secret: str, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(secret), side + server_nonce + client_nonce, "sha256")
